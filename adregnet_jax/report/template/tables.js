"use strict";
// Tables whose rows are sorted by a click on a heading: first the smallest, then the largest.
(() => {
  const value = (row, column) => {
    const text = row.cells[column].dataset.value ?? row.cells[column].textContent;
    const number = Number.parseFloat(text.replace("−", "-"));
    return Number.isNaN(number) ? text : number;
  };

  const compare = (a, b) => {
    if (typeof a === typeof b) return typeof a === "number" ? a - b : a.localeCompare(b, "en", { numeric: true });
    return typeof a === "number" ? -1 : 1; // a dash comes after the numbers
  };

  const sort = (heading) => {
    const table = heading.closest("table");
    const upwards = heading.getAttribute("aria-sort") !== "ascending";
    for (const other of heading.parentElement.cells) other.removeAttribute("aria-sort");
    heading.setAttribute("aria-sort", upwards ? "ascending" : "descending");
    const body = table.tBodies[0];
    const rows = [...body.rows].sort(
      (a, b) => (upwards ? 1 : -1) * compare(value(a, heading.cellIndex), value(b, heading.cellIndex)),
    );
    body.append(...rows);
  };

  for (const heading of document.querySelectorAll("table > thead th")) {
    heading.classList.add("sortable");
    heading.tabIndex = 0;
    heading.title = "sort by this column";
    heading.addEventListener("click", () => sort(heading));
    heading.addEventListener("keydown", (event) => {
      if (event.key === "Enter") sort(heading);
    });
  }
})();
