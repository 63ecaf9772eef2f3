"""What a change did to the figures: `python -m benchmarks.compare OLD.json NEW.json`.

Values are ratios against a reference of the same process, so files of one machine can be compared. Exit
status 1 if a goal that was met is no longer met.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

#: A ratio that moved by less than this share is noise.
NOISE = 0.1


def judge(old: dict[str, Any], new: dict[str, Any]) -> tuple[list[str], bool]:
    """Lines of text, and whether nothing that was met is lost."""
    before = {(r["benchmark"], r["name"], r["against"]): r for r in old["rows"]}
    lines, sound = [], True
    if old["machine"] != new["machine"]:
        changed = [k for k in new["machine"] if old["machine"].get(k) != new["machine"][k]]
        lines.append(f"not the same machine: {', '.join(changed)}")
    for row in new["rows"]:
        was = before.pop((row["benchmark"], row["name"], row["against"]), None)
        if was is None:
            lines.append(f"new       {row['name']}, against {row['against']}: {row['value']:.3f}")
            continue
        change = row["value"] / was["value"] - 1
        if abs(change) < NOISE:
            word = "same"
        elif not row["goal"]:
            word = "moved"
        else:
            word = "better" if (change < 0) == row["goal"].startswith("<=") else "worse"
        if was["met"] and not row["met"]:
            word, sound = "LOST", False
        lines.append(
            f"{word:9} {row['name']}, against {row['against']}: "
            f"{was['value']:.3f} -> {row['value']:.3f} ({100 * change:+.0f} %)"
        )
    lines += [f"gone      {name}, against {against}" for _, name, against in before]
    return lines, sound


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description="Compare two files of benchmarks.bench.")
    parser.add_argument("old", type=Path)
    parser.add_argument("new", type=Path)
    options = parser.parse_args()
    old, new = (json.loads(p.read_text(encoding="utf-8")) for p in (options.old, options.new))
    lines, sound = judge(old, new)
    print("\n".join(lines))
    sys.exit(0 if sound else 1)


if __name__ == "__main__":
    main()
