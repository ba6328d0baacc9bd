"""Writes the table of values into charts/flotilla/README.md from the `# --` comments of values.yaml.

With --check it only says whether the table is current. Needs nothing but Python.
"""

import pathlib
import sys

CHART = pathlib.Path(__file__).resolve().parent.parent / "charts/flotilla"
BEGIN, END = "<!-- values: written by `make generate` -->", "<!-- end of values -->"


def rows(text):
    """Yields (name, default, description) of every documented value."""
    path, description = [], []
    for line in text.splitlines():
        stripped = line.strip()
        if stripped.startswith("# --"):
            description = [stripped[4:].strip()]
        elif stripped.startswith("#"):
            if description:
                description.append(stripped[1:].strip())
        elif ":" in stripped:
            depth = (len(line) - len(line.lstrip())) // 2
            name, default = stripped.split(":", 1)
            path = path[:depth] + [name]
            if description:
                yield ".".join(path), default.strip() or "see values.yaml", " ".join(description)
            description = []
        else:
            description = []


def table(text):
    lines = ["| value | default | what |", "|---|---|---|"]
    for name, default, description in rows(text):
        lines.append(f"| `{name}` | `{default}` | {description.replace('|', chr(92) + '|')} |")
    return "\n".join(lines)


def main():
    readme = CHART / "README.md"
    known = readme.read_text()
    before, rest = known.split(BEGIN, 1)
    after = rest.split(END, 1)[1]
    current = f"{before}{BEGIN}\n{table((CHART / 'values.yaml').read_text())}\n{END}{after}"
    if "--check" in sys.argv[1:]:
        if current != known:
            sys.exit("charts/flotilla/README.md is stale: run `make generate`")
        return
    readme.write_text(current)


if __name__ == "__main__":
    main()
