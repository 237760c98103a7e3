"""Tables in Markdown, and the place in a file that one of them has."""

from collections.abc import Iterable
from pathlib import Path


def table(header: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    """Return a table whose first column stands left, all others right."""
    head = list(header)
    lines = [head, ["---"] + ["---:"] * (len(head) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def replace_section(path: Path, name: str, text: str) -> None:
    """Replace what stands between a file's markers `<!-- name:begin -->` and `<!-- name:end -->`.

    Raises:
        ValueError: The file does not have each marker once, in order.
    """
    begin, end = (f"<!-- {name}:{edge} -->" for edge in ("begin", "end"))
    before, found_begin, rest = path.read_text().partition(begin)
    _, found_end, after = rest.partition(end)
    if not found_begin or not found_end or begin in rest or end in after:
        raise ValueError(f"{path.name} must have the lines {begin} and {end}, once each")
    path.write_text(f"{before}{begin}\n\n{text}\n\n{end}{after}")
