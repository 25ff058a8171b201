#!/usr/bin/env python3
"""Checks that the rooms of src/ include strictly downward and that siblings never meet.

The map is docs/ARCHITECTURE.md's; each CMakeLists.txt must name the same rooms or fewer.
usage: check_includes.py   (from anywhere; exit 1 with one line per wrong include)
"""
import pathlib
import re
import sys

ALLOWED = {  # room: what it may include besides itself
    "base": [],
    "quant": ["base"],
    "gguf": ["base", "quant"],
    "text": ["base", "gguf"],
    "backend": ["base", "quant"],
    "model": ["base", "quant", "gguf", "backend"],
    "reference": ["base", "quant", "backend"],
    "cpu": ["base", "quant", "backend"],
    "cuda": ["base", "quant", "backend"],
    "engine": ["base", "quant", "gguf", "text", "backend", "model", "reference", "cpu", "cuda"],
}
INCLUDE = re.compile(r'^\s*#\s*include\s+"([a-z_]+)/[^"]+"', re.M)
DEPENDS = re.compile(r"DEPENDS\s+([a-z_\s]+?)(?:\)|LIBRARIES)")


def wrong_includes(root):
    for path in sorted((root / "src").rglob("*")):
        if path.suffix not in (".h", ".cc", ".inc", ".cu", ".cuh"):
            continue
        room = path.relative_to(root / "src").parts[0]
        if room not in ALLOWED:
            yield f"{path.relative_to(root)}: the room {room} is not on the map"
            continue
        may = {room, *ALLOWED[room]}
        if path.stem.endswith("_test"):
            may.add("support")  # tests/support
        for included in INCLUDE.findall(path.read_text()):
            if included not in may:
                yield f"{path.relative_to(root)}: {room} may not include {included}"


def wrong_dependencies(root):
    for room, may in ALLOWED.items():
        path = root / "src" / room / "CMakeLists.txt"
        if not path.exists():
            continue
        match = DEPENDS.search(path.read_text())
        for named in match.group(1).split() if match else []:
            if named not in may:
                yield f"{path.relative_to(root)}: {room} may not depend on {named}"


def main():
    root = pathlib.Path(__file__).resolve().parent.parent
    wrong = [*wrong_includes(root), *wrong_dependencies(root)]
    print("\n".join(wrong) if wrong else "includes: all rooms point downward")
    return bool(wrong)


if __name__ == "__main__":
    sys.exit(main())
