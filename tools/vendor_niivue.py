"""Fetches the build of NiiVue that the interactive report embeds, and its licences, from npm.

    python tools/vendor_niivue.py          # writes adregnet_jax/report/niivue
    python tools/vendor_niivue.py --check  # only checks the file that is there; needs no network

To move to another version: change `VERSION`, run the script, put the checksum that it names into `SHA256`,
and run tests/report/test_viewer.py, which compares pixels: the page relies on some of NiiVue's internals.
"""

from __future__ import annotations

import argparse
import hashlib
import subprocess
import sys
import tempfile
from pathlib import Path

VERSION = "0.69.0"
SHA256 = "47b896b77ec4a5be3ef1949c33ad393b6f45629921f326c279000bcf51bdb4af"
BUILD = "dist/niivue.umd.js"
FOLDER = Path(__file__).parents[1] / "adregnet_jax" / "report" / "niivue"
SCRIPT = FOLDER / "niivue.umd.js"
# The package on npm names its licence, and leaves out the text, which its repository has.
LICENCE = """\
BSD 2-Clause License

Copyright (c) 2021, Niivue
All rights reserved.

Redistribution and use in source and binary forms, with or without
modification, are permitted provided that the following conditions are met:

1. Redistributions of source code must retain the above copyright notice, this
   list of conditions and the following disclaimer.

2. Redistributions in binary form must reproduce the above copyright notice,
   this list of conditions and the following disclaimer in the documentation
   and/or other materials provided with the distribution.

THIS SOFTWARE IS PROVIDED BY THE COPYRIGHT HOLDERS AND CONTRIBUTORS "AS IS"
AND ANY EXPRESS OR IMPLIED WARRANTIES, INCLUDING, BUT NOT LIMITED TO, THE
IMPLIED WARRANTIES OF MERCHANTABILITY AND FITNESS FOR A PARTICULAR PURPOSE ARE
DISCLAIMED. IN NO EVENT SHALL THE COPYRIGHT HOLDER OR CONTRIBUTORS BE LIABLE
FOR ANY DIRECT, INDIRECT, INCIDENTAL, SPECIAL, EXEMPLARY, OR CONSEQUENTIAL
DAMAGES (INCLUDING, BUT NOT LIMITED TO, PROCUREMENT OF SUBSTITUTE GOODS OR
SERVICES; LOSS OF USE, DATA, OR PROFITS; OR BUSINESS INTERRUPTION) HOWEVER
CAUSED AND ON ANY THEORY OF LIABILITY, WHETHER IN CONTRACT, STRICT LIABILITY,
OR TORT (INCLUDING NEGLIGENCE OR OTHERWISE) ARISING IN ANY WAY OUT OF THE USE
OF THIS SOFTWARE, EVEN IF ADVISED OF THE POSSIBILITY OF SUCH DAMAGE.
"""


def check(script: bytes) -> None:
    """Ends the program unless the script is the one that `SHA256` names."""
    if (found := hashlib.sha256(script).hexdigest()) != SHA256:
        sys.exit(f"NiiVue {VERSION} has the SHA-256 {found}; expected {SHA256}")


def fetch(folder: Path) -> tuple[bytes, str]:
    """The build, and the licences of NiiVue and of the packages that are built into it."""
    package = f"@niivue/niivue@{VERSION}"
    subprocess.run(["npm", "install", "--silent", "--ignore-scripts", package], cwd=folder, check=True)
    modules = folder / "node_modules"
    script = (modules / "@niivue" / "niivue" / BUILD).read_bytes()
    licences = [f"NiiVue {VERSION}, https://github.com/niivue/niivue\n\n{LICENCE}"]
    texts = (path for path in modules.rglob("*") if path.name.lower().startswith(("license", "licence")))
    for path in sorted(texts):
        if path.is_file():
            name = path.parent.relative_to(modules)
            licences.append(f"Built into it: {name}\n\n{path.read_text(encoding='utf-8').strip()}\n")
    return script, f"\n{'-' * 80}\n\n".join(licences)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--check", action="store_true", help="only check the file that is there")
    if parser.parse_args().check:
        check(SCRIPT.read_bytes())
    else:
        with tempfile.TemporaryDirectory() as temporary:
            script, licences = fetch(Path(temporary))
        check(script)
        FOLDER.mkdir(exist_ok=True)
        SCRIPT.write_bytes(script)
        (FOLDER / "LICENSE.txt").write_text(licences, encoding="utf-8")
    print(f"NiiVue {VERSION}: {SCRIPT.stat().st_size / 2**20:.1f} MiB, SHA-256 {SHA256}")
