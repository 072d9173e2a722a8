"""A table of a page."""


def table(rows: list[list[str]]) -> str:
    """Rows in Markdown, the first of them the head; numbers to the right of the first column."""
    lines = [f"| {' | '.join(row)} |" for row in rows]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(rows[0]) - 1), *lines[1:]])
