"use strict";
// The viewer of registered pairs: three panels, each with the three planes through one point.
//
// NiiVue draws the slices of the scans, blends them and lays out the planes. A second canvas above each of its
// canvases, drawn here, holds what lies over the slices: maps, checkerboard, edges, outlines and landmarks. Mouse
// and keys are handled here, too, so that all panels always show the same point.
//
// All volumes have axes right, anterior, superior. A place is in voxels of the scans on this page, 0 at the centre
// of the first one.
(() => {
  const { Niivue, NVImage, SLICE_TYPE, MULTIPLANAR_TYPE, SHOW_RENDER } = globalThis.niivue;

  const PAIRS = JSON.parse(document.getElementById("pairs").textContent);
  // Horizontal, vertical and normal axis of NiiVue's axial, coronal and sagittal planes.
  const AXES = [[0, 1, 2], [0, 2, 1], [1, 2, 0]];
  const SIDES = ["LR", "PA", "IS"]; // the low and the high end of each axis
  const PLANES = { axial: SLICE_TYPE.AXIAL, coronal: SLICE_TYPE.CORONAL, sagittal: SLICE_TYPE.SAGITTAL, all: SLICE_TYPE.MULTIPLANAR };
  const COLOURS = { fixed: "#4dd2ff", moving: "#ff9f43", warped: "#ffe14d", folded: "#ff00ff", residual: "#7dff6b", crossHair: "#6cb6ffb0", edges: "#ff5fd2" };
  const FLICKER_MS = 450;
  const SQUARES = 8; // of the checkerboard, along the longest side
  const EDGES = 0.88; // share of the gradients of a slice that are no edges
  const FAINTEST_EDGE = 60; // by Sobel's filter, of 8-bit greys
  const NEAR_MM = 5; // landmarks up to this far from a slice are drawn on it
  const MOST_ZOOM = 12;

  const element = (id) => document.getElementById(id);
  const make = (tag, text, className) => {
    const made = document.createElement(tag);
    if (text !== undefined) made.textContent = text;
    if (className) made.className = className;
    return made;
  };
  const clamp = (value, low, high) => Math.min(high, Math.max(low, value));

  // The state of the view; `redraw` shows it.
  const view = {
    pair: 0, at: [0, 0, 0], plane: 0, planes: "all", alone: null, zoom: 1, pan: [0, 0, 0],
    blend: 1, second: "warped", flicker: false, checkerboard: false, edges: "", map: "", opacity: 0.55,
    labels: "all", landmarks: true, chosen: -1, window: [0, 255],
  };
  let fixedShown = false; // by the flicker, now
  let pair = null; // what is loaded
  let recolour = false; // whether the greys are to change at the next drawing
  const panels = [];

  const bytesOf = async (number, name) => {
    const base64 = element(`volume-${number}-${name}`).textContent;
    const text = atob(base64);
    const packed = new Uint8Array(text.length);
    for (let i = 0; i < text.length; i++) packed[i] = text.charCodeAt(i);
    const stream = new Blob([packed]).stream().pipeThrough(new DecompressionStream("gzip"));
    return new Response(stream).arrayBuffer();
  };

  const scanOf = async (number, name) => {
    const file = await bytesOf(number, name);
    const { shape } = PAIRS[number];
    const values = new Uint8Array(file, file.byteLength - shape[0] * shape[1] * shape[2]);
    return { file, shape, values, factors: [1, 1, 1] };
  };

  const arrayOf = async (number, name, shape, factors, bytes) => {
    const buffer = await bytesOf(number, name);
    return { shape, factors, values: bytes === 2 ? new Uint16Array(buffer) : new Uint8Array(buffer) };
  };

  const imageOf = (name) => NVImage.new(pair.scans[name].file, `${name}.nii`, "gray", 1, null, 0, 255);

  // What each panel shows: a scan, and over it the one to compare it with.
  const SHOWN = { fixed: () => ["fixed"], moving: () => ["moving"], compared: () => ["fixed", view.second] };

  const load = async (number) => {
    element("pair").disabled = true; // one pair at a time
    const record = PAIRS[number];
    const decoded = Object.fromEntries(["fixed", "moving", "warped"].map((name) => [name, scanOf(number, name)]));
    pair = { ...record, scans: { fixed: await decoded.fixed }, mapVolumes: {}, labelVolumes: {} };
    for (const panel of panels) panel.shows = null;
    Object.assign(view, { pair: number, chosen: -1 });
    resetView();
    describePair();
    // The first picture comes as soon as one panel can draw.
    for (const [name, scans] of Object.entries(SHOWN)) {
      const panel = panels.find((one) => one.name === name) ?? (await startPanel(name));
      panel.scans = scans();
      const images = [];
      for (const scan of panel.scans) {
        pair.scans[scan] = await decoded[scan];
        images.push(await imageOf(scan));
      }
      for (const image of [...panel.niivue.volumes]) panel.niivue.removeVolume(image);
      for (const image of images) panel.niivue.addVolume(image);
      panel.shows = pair;
      draw();
      const { gl } = panel.niivue;
      gl.readPixels(0, 0, 1, 1, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(4)); // waits for the GPU
      performance.mark(`${name} drawn`);
      await new Promise((done) => setTimeout(done)); // lets the browser show it
    }
    pair.scans = { fixed: pair.scans.fixed, moving: await decoded.moving, warped: await decoded.warped };
    await showSecond(); // which may have changed in the meantime
    for (const map of record.maps) {
      pair.mapVolumes[map.name] = await arrayOf(number, map.name, map.shape, map.factors, 1);
    }
    for (const name of ["fixed", "moving", "warped"]) {
      if (!element(`volume-${number}-${name}_labels`)) continue;
      pair.labelVolumes[name] = await arrayOf(number, `${name}_labels`, record.shape, [1, 1, 1], record.label_bytes);
    }
    element("pair").disabled = false;
    draw();
  };

  // Puts the scan that `view.second` names over the fixed one.
  const showSecond = async () => {
    const panel = panels.find((one) => one.name === "compared");
    if (panel?.shows !== pair || panel.scans[1] === view.second) return;
    panel.scans[1] = view.second;
    const image = await imageOf(view.second);
    panel.niivue.removeVolume(panel.niivue.volumes[1]);
    panel.niivue.addVolume(image);
    redraw();
  };

  const placing = (niivue, tile) => {
    const [h, v, normal] = AXES[tile.axCorSag];
    const low = niivue.frac2mm([0, 0, 0]);
    const high = niivue.frac2mm([1, 1, 1]);
    const [left, top, width, height] = tile.leftTopWidthHeight;
    const perVoxel = [0, 1, 2].map((axis) => (high[axis] - low[axis]) / pair.shape[axis]);
    const x1 = (perVoxel[h] / tile.fovMM[0]) * width;
    const y1 = (-perVoxel[v] / tile.fovMM[1]) * height;
    const x0 = left + ((low[h] + 0.5 * perVoxel[h] - tile.leftTopMM[0]) / tile.fovMM[0]) * width;
    const y0 = top + height - ((low[v] + 0.5 * perVoxel[v] - tile.leftTopMM[1]) / tile.fovMM[1]) * height;
    return {
      h, v, normal, box: [left, top, width, height], x0, x1, y0, y1,
      x: (voxel) => x0 + x1 * voxel,
      y: (voxel) => y0 + y1 * voxel,
      inside: (x, y) => x >= left && x < left + width && y >= top && y < top + height,
    };
  };

  const tilesOf = (panel) =>
    panel.niivue.screenSlices.filter((tile) => tile.axCorSag < 3 && tile.fovMM.length > 1).map((tile) => placing(panel.niivue, tile));

  const moveTo = (place) => {
    view.at = place.map((value, axis) => clamp(value, 0, pair.shape[axis] - 1));
    redraw();
  };

  const step = (axis, by) => {
    const place = view.at.map(Math.round);
    place[axis] += by;
    moveTo(place);
  };

  // Zooms about the cross-hair, which stays where it is on the screen.
  const zoomTo = (zoom) => {
    const to = clamp(zoom, 1, MOST_ZOOM);
    const mm = panels[0].niivue.frac2mm(fraction());
    view.pan = to === 1 ? [0, 0, 0] : view.pan.map((pan, axis) => pan + (view.zoom - to) * mm[axis]);
    view.zoom = to;
    redraw();
  };

  const resetView = () => {
    Object.assign(view, { zoom: 1, pan: [0, 0, 0], at: pair.start.slice() });
  };

  const fraction = () => view.at.map((value, axis) => (value + 0.5) / pair.shape[axis]);

  const sliceOf = (volume, { h, v, normal }) => {
    const { shape, factors, values } = volume;
    const strides = [1, shape[0], shape[0] * shape[1]];
    const index = clamp(Math.floor((Math.round(view.at[normal]) + 0.5) / factors[normal]), 0, shape[normal] - 1);
    const slice = new values.constructor(shape[h] * shape[v]);
    let to = 0;
    for (let j = 0; j < shape[v]; j++) {
      let from = index * strides[normal] + j * strides[v];
      for (let i = 0; i < shape[h]; i++, from += strides[h]) slice[to++] = values[from];
    }
    return { width: shape[h], height: shape[v], values: slice };
  };

  const painted = (slice, table) => {
    const canvas = document.createElement("canvas");
    canvas.width = slice.width;
    canvas.height = slice.height;
    const image = new ImageData(slice.width, slice.height);
    const pixels = new Uint32Array(image.data.buffer);
    for (let i = 0; i < pixels.length; i++) pixels[i] = table[slice.values[i]];
    canvas.getContext("2d").putImageData(image, 0, 0);
    return canvas;
  };

  // Draws such an image where its voxels lie.
  const put = (context, canvas, tile, factors, smooth) => {
    const ratio = [factors[tile.h], factors[tile.v]];
    context.save();
    context.imageSmoothingEnabled = smooth;
    context.transform(tile.x1 * ratio[0], 0, 0, tile.y1 * ratio[1], tile.x(-0.5), tile.y(-0.5));
    context.drawImage(canvas, 0, 0);
    context.restore();
  };

  const rgba = (red, green, blue, alpha = 255) => ((alpha << 24) | (blue << 16) | (green << 8) | red) >>> 0;

  const greys = () => {
    const [low, high] = view.window;
    return Uint32Array.from({ length: 256 }, (_, code) => {
      const grey = clamp(Math.round((255 * (code - low)) / (high - low)), 0, 255);
      return rgba(grey, grey, grey);
    });
  };

  const valueOf = (map, code) => map.first + (code - 1) * map.step;

  const coloursOf = (map) => {
    const bytes = map.colours.match(/../g).map((digits) => Number.parseInt(digits, 16));
    return Uint32Array.from({ length: 256 }, (_, code) => {
      if (code === 0) return map.zero === "folded" ? rgba(255, 0, 255) : 0;
      const place = clamp((valueOf(map, code) - map.low) / (map.high - map.low), 0, 1);
      const from = 3 * Math.round(255 * place);
      // Where a map around a middle has nothing to show, the scan is seen.
      const alpha = map.name === "jacobian" ? Math.round(255 * Math.sqrt(Math.abs(2 * place - 1))) : 255;
      return rgba(bytes[from], bytes[from + 1], bytes[from + 2], alpha);
    });
  };

  const drawMap = (context, tile) => {
    const map = pair.maps.find((one) => one.name === view.map);
    const volume = pair.mapVolumes[view.map];
    if (!map || !volume) return;
    context.globalAlpha = view.opacity;
    put(context, painted(sliceOf(volume, tile), coloursOf(map)), tile, volume.factors, map.zero !== "folded");
    context.globalAlpha = 1;
  };

  const drawCheckerboard = (context, tile) => {
    const side = Math.max(...pair.shape.map((n, axis) => n * pair.spacing_mm[axis])) / SQUARES;
    const voxels = [tile.h, tile.v].map((axis) => side / pair.spacing_mm[axis]);
    context.save();
    context.beginPath();
    for (let j = 0; j * voxels[1] < pair.shape[tile.v]; j++) {
      for (let i = j % 2; i * voxels[0] < pair.shape[tile.h]; i += 2) {
        const width = Math.min(voxels[0], pair.shape[tile.h] - i * voxels[0]);
        const height = Math.min(voxels[1], pair.shape[tile.v] - j * voxels[1]);
        context.rect(tile.x(i * voxels[0] - 0.5), tile.y(j * voxels[1] - 0.5), width * tile.x1, height * tile.y1);
      }
    }
    context.clip();
    put(context, painted(sliceOf(pair.scans.fixed, tile), greys()), tile, [1, 1, 1], true);
    context.restore();
  };

  // Ridges of the gradient of a slice, where intensities change most: places [i, j] with the direction along the edge.
  const edgesOf = ({ width, height, values }) => {
    const gradients = [new Float32Array(width * height), new Float32Array(width * height)];
    const size = new Float32Array(width * height);
    for (let j = 1; j < height - 1; j++) {
      for (let i = 1; i < width - 1; i++) {
        const k = j * width + i;
        const at = (di, dj) => values[k + di + dj * width];
        const gx = at(1, -1) + 2 * at(1, 0) + at(1, 1) - at(-1, -1) - 2 * at(-1, 0) - at(-1, 1);
        const gy = at(-1, 1) + 2 * at(0, 1) + at(1, 1) - at(-1, -1) - 2 * at(0, -1) - at(1, -1);
        [gradients[0][k], gradients[1][k], size[k]] = [gx, gy, Math.hypot(gx, gy)];
      }
    }
    const sorted = size.slice().sort();
    const least = Math.max(sorted[Math.floor(EDGES * (sorted.length - 1))], FAINTEST_EDGE);
    const edges = [];
    for (let j = 1; j < height - 1; j++) {
      for (let i = 1; i < width - 1; i++) {
        const k = j * width + i;
        const across = Math.abs(gradients[1][k]) > Math.abs(gradients[0][k]) ? width : 1;
        if (size[k] <= least || size[k] < size[k - across] || size[k] <= size[k + across]) continue;
        edges.push([i, j, -gradients[1][k] / size[k], gradients[0][k] / size[k]]);
      }
    }
    return edges;
  };

  const drawEdges = (context, tile) => {
    const name = view.edges === "fixed" ? "fixed" : view.second;
    const length = 0.6; // voxels to each side, so that neighbours meet
    context.beginPath();
    for (const [i, j, di, dj] of edgesOf(sliceOf(pair.scans[name], tile))) {
      context.moveTo(tile.x(i - length * di), tile.y(j - length * dj));
      context.lineTo(tile.x(i + length * di), tile.y(j + length * dj));
    }
    context.strokeStyle = COLOURS.edges;
    context.lineWidth = 1.25 * devicePixelRatio;
    context.stroke();
  };

  // The borders between the labels of a slice, along the sides of its voxels.
  const drawOutlines = (context, tile, name) => {
    const volume = pair.labelVolumes[name];
    if (!volume) return;
    const { width, height, values } = sliceOf(volume, tile);
    if (view.labels !== "all") {
      const chosen = Number(view.labels);
      for (let k = 0; k < values.length; k++) values[k] = values[k] === chosen ? 1 : 0;
    }
    context.beginPath();
    for (let j = 0; j < height; j++) {
      for (let i = 0; i < width; i++) {
        const label = values[j * width + i];
        if (i + 1 < width && values[j * width + i + 1] !== label) {
          context.moveTo(tile.x(i + 0.5), tile.y(j - 0.5));
          context.lineTo(tile.x(i + 0.5), tile.y(j + 0.5));
        }
        if (j + 1 < height && values[(j + 1) * width + i] !== label) {
          context.moveTo(tile.x(i - 0.5), tile.y(j + 0.5));
          context.lineTo(tile.x(i + 0.5), tile.y(j + 0.5));
        }
      }
    }
    context.strokeStyle = COLOURS[name];
    context.lineWidth = 1.25 * devicePixelRatio;
    context.stroke();
  };

  const arrow = (context, from, to, size) => {
    context.beginPath();
    context.moveTo(...from);
    context.lineTo(...to);
    const length = Math.hypot(to[0] - from[0], to[1] - from[1]);
    if (length > size) {
      const along = Math.atan2(to[1] - from[1], to[0] - from[0]);
      for (const turn of [2.6, -2.6]) {
        context.moveTo(...to);
        context.lineTo(to[0] + size * Math.cos(along + turn), to[1] + size * Math.sin(along + turn));
      }
    }
    context.stroke();
  };

  // Each landmark near the slice, with an arrow to its partner: by the headers in the panel of the moving scan, by
  // the registration in the others.
  const drawLandmarks = (context, tile, before) => {
    const ratio = devicePixelRatio;
    pair.landmarks.forEach((landmark, number) => {
      const away = Math.abs(landmark.at[tile.normal] - view.at[tile.normal]) * pair.spacing_mm[tile.normal];
      if (away > NEAR_MM && number !== view.chosen) return;
      const end = before ? landmark.moving : landmark.at.map((value, axis) => value + landmark.residual[axis]);
      const [from, to] = [landmark.at, end].map((place) => [tile.x(place[tile.h]), tile.y(place[tile.v])]);
      context.globalAlpha = number === view.chosen ? 1 : 1 - (0.75 * away) / NEAR_MM;
      context.strokeStyle = number === view.chosen ? "#fff" : before ? COLOURS.moving : COLOURS.residual;
      context.fillStyle = context.strokeStyle;
      context.lineWidth = (number === view.chosen ? 2.5 : 1.75) * ratio;
      arrow(context, from, to, 5 * ratio);
      context.beginPath();
      context.arc(...from, (number === view.chosen ? 3.5 : 2.2) * ratio, 0, 2 * Math.PI);
      context.fill();
    });
    context.globalAlpha = 1;
  };

  const drawCrossHair = (context, tile) => {
    const [left, top, width, height] = tile.box;
    const gap = 7 * devicePixelRatio;
    const [x, y] = [tile.x(view.at[tile.h]), tile.y(view.at[tile.v])].map((place) => Math.floor(place) + 0.5);
    context.beginPath();
    for (const [from, to] of [[left, x - gap], [x + gap, left + width]]) {
      context.moveTo(from, y);
      context.lineTo(Math.max(from, to), y);
    }
    for (const [from, to] of [[top, y - gap], [y + gap, top + height]]) {
      context.moveTo(x, from);
      context.lineTo(x, Math.max(from, to));
    }
    context.strokeStyle = COLOURS.crossHair;
    context.lineWidth = Math.max(1, Math.round(devicePixelRatio));
    context.stroke();
  };

  // What is on the left and at the top of a plane.
  const drawLetters = (context, tile) => {
    const [left, top, width, height] = tile.box;
    const size = 13 * devicePixelRatio;
    if (Math.min(width, height) < 4 * size) return;
    context.font = `${size}px system-ui, sans-serif`;
    context.fillStyle = "#cdd3da";
    context.textBaseline = "top";
    context.shadowColor = "#000";
    context.shadowBlur = 3 * devicePixelRatio;
    context.fillText(SIDES[tile.h][tile.x1 > 0 ? 0 : 1], left + 0.3 * size, top + height / 2 - 1.3 * size);
    context.fillText(SIDES[tile.v][tile.y1 > 0 ? 0 : 1], left + width / 2 + 0.4 * size, top + 0.3 * size);
    context.shadowBlur = 0;
  };

  const drawMarks = (panel) => {
    const { width, height } = panel.slices;
    if (panel.marks.width !== width) panel.marks.width = width;
    if (panel.marks.height !== height) panel.marks.height = height;
    const context = panel.marks.getContext("2d");
    context.clearRect(0, 0, width, height);
    const compared = panel.name === "compared";
    for (const tile of tilesOf(panel)) {
      context.save();
      context.beginPath();
      context.rect(...tile.box);
      context.clip();
      if (compared && view.checkerboard) drawCheckerboard(context, tile);
      if (compared && view.map) drawMap(context, tile);
      if (compared && view.edges) drawEdges(context, tile);
      if (view.labels) {
        drawOutlines(context, tile, "fixed");
        if (panel.name === "moving") drawOutlines(context, tile, "moving");
        if (compared) drawOutlines(context, tile, view.second);
      }
      if (view.landmarks) drawLandmarks(context, tile, panel.name === "moving" || (compared && view.second === "moving"));
      drawCrossHair(context, tile);
      drawLetters(context, tile);
      context.restore();
    }
  };

  let waiting = false;
  const redraw = () => {
    if (waiting) return;
    waiting = true;
    requestAnimationFrame(() => {
      waiting = false;
      draw();
    });
  };

  const draw = () => {
    if (!pair) return;
    element("panel-compared").querySelector("figcaption").textContent = comparedTitle();
    for (const panel of panels) {
      panel.figure.hidden = view.alone !== null && view.alone !== panel.name;
      if (panel.shows !== pair) continue;
      const { niivue } = panel;
      if (recolour) niivue.volumes.forEach((image, layer) => fillTexture(niivue, image, layer));
      niivue.scene.crosshairPos = fraction();
      niivue.scene.pan2Dxyzmm = [...view.pan, view.zoom];
      niivue.opts.sliceType = PLANES[view.planes];
      niivue.opts.multiplanarLayout = view.alone ? MULTIPLANAR_TYPE.AUTO : MULTIPLANAR_TYPE.COLUMN;
      if (panel.name === "compared") niivue.overlayAlphaShader = shownBlend();
      niivue.drawScene();
    }
    recolour = false;
    document.querySelector("#viewer .panels").classList.toggle("alone", view.alone !== null);
    showReadout();
    showLegend();
    showControls();
  };

  const shownBlend = () => {
    if (view.flicker) return fixedShown ? 0 : 1;
    return view.checkerboard ? 1 : view.blend;
  };

  const comparedTitle = () => {
    const name = view.second === "warped" ? "warped" : "moving, before";
    if (view.checkerboard) return `fixed and ${name}, checkerboard`;
    if (view.flicker) return fixedShown ? "fixed" : name;
    if (view.blend === 1) return name;
    return view.blend === 0 ? "fixed" : `${Math.round(100 * view.blend)} % ${name}, over fixed`;
  };

  const valueAt = ({ shape, factors, values }) => {
    const [x, y, z] = view.at.map((value, axis) =>
      clamp(Math.floor((Math.round(value) + 0.5) / factors[axis]), 0, shape[axis] - 1),
    );
    return values[x + shape[0] * (y + shape[1] * z)];
  };

  const applied = (matrix, place) =>
    matrix.slice(0, 3).map((row) => row[0] * place[0] + row[1] * place[1] + row[2] * place[2] + row[3]);

  // In the units of the scan; the ends of its window stand for all beyond them.
  const intensity = (name, code) => {
    const [low, high] = pair.windows[name];
    const digits = clamp(Math.ceil(2 - Math.log10(high - low)), 0, 6);
    const beyond = code === 0 ? "≤ " : code === 255 ? "≥ " : "";
    return beyond + (low + (code / 255) * (high - low)).toFixed(digits);
  };

  const showReadout = () => {
    const entries = [
      ["mm (R, A, S)", applied(pair.affine, view.at).map((value) => value.toFixed(1)).join(", ")],
      ["voxel of the file", applied(pair.to_file, view.at).map((value) => Math.round(value)).join(", ")],
      ...Object.entries(pair.scans).map(([name, scan]) => [name, intensity(name, valueAt(scan))]),
    ];
    for (const map of pair.maps) {
      const volume = pair.mapVolumes[map.name];
      if (!volume) continue;
      const code = valueAt(volume);
      const text = code === 0 ? map.zero : `${valueOf(map, code).toFixed(2)} ${map.unit}`.trim();
      entries.push([map.title, text]);
    }
    for (const [name, volume] of Object.entries(pair.labelVolumes)) {
      const rank = valueAt(volume);
      if (rank) entries.push([`${name} label`, pair.labels[rank - 1].name]);
    }
    const spans = entries.map(([name, value]) => {
      const span = make("span", `${name} `);
      span.append(make("b", value));
      return span;
    });
    element("readout").replaceChildren(...spans);
  };

  const showLegend = () => {
    const parts = [];
    const line = (colour, text) => {
      const part = make("span");
      const stroke = make("span", undefined, "line");
      stroke.style.borderColor = colour;
      part.append(stroke, text);
      parts.push(part);
    };
    if (view.labels && pair.labels.length) {
      line(COLOURS.fixed, "outlines, fixed");
      line(COLOURS.moving, "before");
      line(COLOURS.warped, "after");
    }
    if (view.landmarks && pair.landmarks.length) {
      line(COLOURS.moving, "landmark to its partner, before");
      line(COLOURS.residual, "residual, after");
    }
    if (view.edges) line(COLOURS.edges, `edges of ${view.edges === "fixed" ? "fixed" : view.second}`);
    const map = pair.maps.find((one) => one.name === view.map);
    if (map) {
      const part = make("span");
      const bar = make("span", undefined, "bar");
      const stops = Array.from({ length: 17 }, (_, i) => `#${map.colours.slice(6 * Math.round((255 * i) / 16)).slice(0, 6)}`);
      bar.style.background = `linear-gradient(to right, ${stops.join(", ")})`;
      part.append(`${map.title} ${map.low.toFixed(map.low ? 2 : 0)}`, bar, `${map.high.toFixed(2)} ${map.unit}`.trim());
      parts.push(part);
      if (map.zero === "folded") line(COLOURS.folded, "folded");
    }
    element("legend").replaceChildren(...parts);
  };

  const showControls = () => {
    element("planes").value = view.planes;
    element("second").value = view.second;
    element("second-name").textContent = view.second;
    element("blend").value = Math.round(100 * view.blend);
    element("flicker").checked = view.flicker;
    element("checkerboard").checked = view.checkerboard;
    element("edges").value = view.edges;
    element("map").value = view.map;
    element("opacity").value = Math.round(100 * view.opacity);
    element("labels").value = view.labels;
    element("landmarks").checked = view.landmarks;
    for (const row of element("landmark-list").querySelectorAll("tbody tr")) {
      row.setAttribute("aria-selected", String(Number(row.dataset.number) === view.chosen));
    }
  };

  const describePair = () => {
    const offer = (id, choices) => {
      const options = choices.map(([value, text]) => {
        const option = make("option", text);
        option.value = value;
        return option;
      });
      element(id).replaceChildren(...options);
    };
    offer("map", [["", "none"], ...pair.maps.map((map) => [map.name, map.title])]);
    offer("labels", [["", "none"], ["all", "all"], ...pair.labels.map(({ name }, index) => [String(index + 1), name])]);
    if (Number(view.labels) > pair.labels.length) view.labels = "all";
    if (!pair.maps.some((map) => map.name === view.map)) view.map = "";
    element("show-labels").hidden = pair.labels.length === 0;
    element("show-landmarks").hidden = pair.landmarks.length === 0;
    element("landmark-list").hidden = pair.landmarks.length === 0;
    const rows = pair.landmarks.map((landmark, number) => {
      const row = make("tr");
      row.dataset.number = String(number);
      row.append(make("td", String(number + 1)), make("td", landmark.before_mm.toFixed(2)), make("td", landmark.after_mm.toFixed(2)));
      row.addEventListener("click", () => choose(number));
      return row;
    });
    element("landmark-list").querySelector("tbody").replaceChildren(...rows);
    element("note").textContent = pair.note;
  };

  const choose = (number) => {
    const count = pair.landmarks.length;
    if (count === 0) return;
    view.chosen = ((number % count) + count) % count;
    view.landmarks = true;
    moveTo(pair.landmarks[view.chosen].at);
    element("landmark-list").querySelector(`tr[data-number="${view.chosen}"]`)?.scrollIntoView({ block: "nearest" });
  };

  const setWindow = (low, high) => {
    view.window = [low, Math.max(high, low + 2)];
    recolour = true;
  };

  const pixel = (panel, event) => {
    const box = panel.marks.getBoundingClientRect();
    return [
      ((event.clientX - box.left) * panel.marks.width) / box.width,
      ((event.clientY - box.top) * panel.marks.height) / box.height,
    ];
  };

  const tileUnder = (panel, x, y) => panel.shows === pair && tilesOf(panel).find((tile) => tile.inside(x, y));

  const listen = (panel) => {
    let drag = null;
    panel.marks.addEventListener("pointerdown", (event) => {
      if (!pair) return;
      const [x, y] = pixel(panel, event);
      const tile = tileUnder(panel, x, y);
      if (!tile) return;
      view.plane = AXES.findIndex((axes) => axes[2] === tile.normal);
      const action = event.button === 2 ? "window" : event.button === 1 || event.shiftKey ? "pan" : "move";
      drag = { action, tile, x, y, pan: view.pan.slice(), window: view.window.slice() };
      panel.marks.setPointerCapture(event.pointerId);
      panel.marks.focus({ preventScroll: true });
      event.preventDefault();
      if (action === "move") follow(x, y);
    });
    const follow = (x, y) => {
      const place = view.at.slice();
      place[drag.tile.h] = Math.round((x - drag.tile.x0) / drag.tile.x1);
      place[drag.tile.v] = Math.round((y - drag.tile.y0) / drag.tile.y1);
      moveTo(place);
    };
    panel.marks.addEventListener("pointermove", (event) => {
      if (!drag) return;
      const [x, y] = pixel(panel, event);
      if (drag.action === "move") return follow(x, y);
      const by = [x - drag.x, y - drag.y];
      if (drag.action === "pan") {
        const mm = [0, 0, 0];
        mm[drag.tile.h] = (by[0] / drag.tile.x1) * pair.spacing_mm[drag.tile.h] * view.zoom;
        mm[drag.tile.v] = (by[1] / drag.tile.y1) * pair.spacing_mm[drag.tile.v] * view.zoom;
        view.pan = drag.pan.map((pan, axis) => pan + mm[axis]);
        return redraw();
      }
      const [low, high] = drag.window;
      const scale = 255 / panel.marks.height;
      const width = Math.max(4, high - low + by[0] * scale);
      const centre = (low + high) / 2 + by[1] * scale;
      setWindow(centre - width / 2, centre + width / 2);
      return redraw();
    });
    const end = () => {
      drag = null;
    };
    panel.marks.addEventListener("pointerup", end);
    panel.marks.addEventListener("pointercancel", end);
    panel.marks.addEventListener("contextmenu", (event) => event.preventDefault());
    panel.marks.addEventListener("dblclick", () => enlarge(panel.name));
    panel.marks.addEventListener(
      "wheel",
      (event) => {
        if (!pair) return;
        event.preventDefault();
        if (event.ctrlKey) return zoomTo(view.zoom * (event.deltaY < 0 ? 1.15 : 1 / 1.15));
        const tile = tileUnder(panel, ...pixel(panel, event));
        if (tile) step(tile.normal, event.deltaY < 0 ? 1 : -1);
      },
      { passive: false },
    );
  };

  const enlarge = (name) => {
    view.alone = view.alone === null ? name : null;
    redraw();
  };

  const set = (name, value) => {
    view[name] = value;
    if (name === "second") showSecond();
    if (name === "flicker") fixedShown = false;
    redraw();
  };

  const cycled = (values, value) => values[(values.indexOf(value) + 1) % values.length];

  const across = (direction) => {
    // To the right of the screen is the patient's left, but on a sagittal slice the back.
    const [h] = AXES[view.plane];
    step(h, -direction);
  };

  const KEYS = {
    ArrowLeft: () => across(-1),
    ArrowRight: () => across(1),
    ArrowUp: () => step(AXES[view.plane][1], 1),
    ArrowDown: () => step(AXES[view.plane][1], -1),
    PageUp: () => step(AXES[view.plane][2], 1),
    PageDown: () => step(AXES[view.plane][2], -1),
    1: () => set("planes", "axial"),
    2: () => set("planes", "coronal"),
    3: () => set("planes", "sagittal"),
    4: () => set("planes", "all"),
    "+": () => zoomTo(view.zoom * 1.25),
    "=": () => zoomTo(view.zoom * 1.25),
    "-": () => zoomTo(view.zoom / 1.25),
    ",": () => set("blend", clamp(view.blend - 0.1, 0, 1)),
    ".": () => set("blend", clamp(view.blend + 0.1, 0, 1)),
    f: () => set("flicker", !view.flicker),
    c: () => set("checkerboard", !view.checkerboard),
    e: () => set("edges", cycled(["", "fixed", "second"], view.edges)),
    s: () => set("second", cycled(["warped", "moving"], view.second)),
    m: () => set("map", cycled(["", ...pair.maps.map((map) => map.name)], view.map)),
    o: () => set("labels", view.labels ? "" : "all"),
    l: () => set("landmarks", !view.landmarks),
    n: () => choose(view.chosen + 1),
    p: () => choose(view.chosen < 0 ? -1 : view.chosen - 1),
    x: () => enlarge("compared"),
    Escape: () => set("alone", null),
    r: () => reset(),
  };

  const reset = () => {
    resetView();
    setWindow(0, 255);
    redraw();
  };

  const listenToControls = () => {
    for (const name of ["planes", "second", "edges", "map", "labels"]) {
      element(name).addEventListener("change", (event) => set(name, event.target.value));
    }
    for (const name of ["flicker", "checkerboard", "landmarks"]) {
      element(name).addEventListener("change", (event) => set(name, event.target.checked));
    }
    for (const name of ["blend", "opacity"]) {
      element(name).addEventListener("input", (event) => set(name, Number(event.target.value) / 100));
    }
    element("reset").addEventListener("click", reset);
    element("pair").addEventListener("change", (event) => load(Number(event.target.value)));
    document.addEventListener("keydown", (event) => {
      const typing = event.target.closest?.("select, input[type=range], th");
      const action = KEYS[event.key];
      if (!pair || !action || typing || event.ctrlKey || event.altKey || event.metaKey) return;
      // Arrows and page keys scroll the page, unless a panel has the focus.
      if (/^(Arrow|Page)/.test(event.key) && !event.target.classList.contains("marks")) return;
      event.preventDefault();
      action();
    });
    setInterval(() => {
      if (!view.flicker || document.hidden) return;
      fixedShown = !fixedShown;
      redraw();
    }, FLICKER_MS);
  };

  // NiiVue turns and colours a scan slice by slice on the GPU, which takes seconds where the processor stands in for
  // one. The scans of this page need no turning: their greys are copied into the texture instead.
  const fillTexturesAtOnce = (niivue) => {
    const refresh = niivue.refreshLayers.bind(niivue);
    niivue.refreshLayers = (image, layer) => {
      niivue.gl.drawArrays = () => {};
      refresh(image, layer);
      delete niivue.gl.drawArrays; // that of the prototype is back
      fillTexture(niivue, image, layer);
    };
  };

  const fillTexture = ({ gl, volumeTexture, overlayTexture }, image, layer) => {
    const table = greys();
    const colours = new Uint32Array(image.img.length);
    for (let i = 0; i < colours.length; i++) colours[i] = table[image.img[i]];
    gl.activeTexture(layer === 0 ? gl.TEXTURE0 : gl.TEXTURE2); // as NiiVue's shaders expect them
    gl.bindTexture(gl.TEXTURE_3D, layer === 0 ? volumeTexture : overlayTexture);
    gl.pixelStorei(gl.UNPACK_ALIGNMENT, 4);
    gl.texSubImage3D(gl.TEXTURE_3D, 0, 0, 0, 0, ...pair.shape, gl.RGBA, gl.UNSIGNED_BYTE, new Uint8Array(colours.buffer));
  };

  const startPanel = async (name) => {
    const figure = element(`panel-${name}`);
    const slices = figure.querySelector(".slices");
    const marks = figure.querySelector(".marks");
    const niivue = new Niivue({
      backColor: [0, 0, 0, 1],
      crosshairWidth: 0, // `drawCrossHair` draws a thinner one
      dragAndDropEnabled: false,
      interactive: false,
      isOrientationTextVisible: false, // `drawLetters` writes above the maps
      isRadiologicalConvention: true,
      loadingText: "",
      logLevel: "error",
      multiplanarLayout: MULTIPLANAR_TYPE.COLUMN,
      multiplanarShowRender: SHOW_RENDER.NEVER,
      sagittalNoseLeft: true,
      sliceType: SLICE_TYPE.MULTIPLANAR,
      tileMargin: 0,
    });
    await niivue.attachToCanvas(slices, false);
    fillTexturesAtOnce(niivue);
    // `shows`: the pair whose scans NiiVue has, `scans`: the names of these.
    const panel = { name, figure, slices, marks, niivue, shows: null, scans: [] };
    const drawSlices = niivue.drawScene.bind(niivue);
    niivue.drawScene = () => {
      const hidden = slices.offsetParent === null || slices.width === 0;
      if (hidden || panel.shows !== pair) return undefined;
      const result = drawSlices();
      drawMarks(panel);
      return result;
    };
    listen(panel);
    panels.push(panel);
    return panel;
  };

  const start = async () => {
    if (PAIRS.length > 1) {
      element("choose-pair").hidden = false;
      PAIRS.forEach((one, number) => {
        const option = make("option", one.name);
        option.value = String(number);
        element("pair").append(option);
      });
    }
    listenToControls();
    await load(0);
  };

  // For tests: the state, the places of the planes, and a promise that is fulfilled when everything is drawn.
  const tiles = (name) => tilesOf(panels.find((panel) => panel.name === name));
  globalThis.viewer = { view, panels, tiles, draw, ready: null };
  globalThis.viewer.ready = start().catch((error) => {
    const stage = document.querySelector("#viewer .stage");
    stage.replaceChildren(make("p", `The viewer can't start (${error.message}). It needs WebGL 2; the option --report static draws pictures instead.`, "failure"));
    throw error;
  });
})();
