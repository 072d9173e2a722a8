"""The documents of tables: a column of parquet or arrow files, in batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from mistral_sae.cli import one_line, size_of
from mistral_sae.data.place import Place
from mistral_sae.data.records import Document, Fault, Wanted, document_of

CHUNK = 1 << 20  # bytes of a parquet file that are read at once
PARQUET_ROWS = 32  # rows of it that are held at once
PARQUET_TIMES = 500  # the size of a parquet file that a group of its rows unpacks to at most; text does to 20

Columns = Iterator[tuple[int, Any]]  # that of the text, batch by batch, each with the number of its first row


class _NoColumn(LookupError):
    """A table without the column, and the names of those it has."""


def table_records(
    read: Callable[[Path, Wanted, int], Columns], name: str, path: Path, wanted: Wanted, start: Place
) -> Iterator[Document | Fault]:
    """The documents of a file that `read` reads; ids are `name:row`. Raises OSError for one that is damaged."""
    import pyarrow

    field = wanted.text_field
    try:
        for first, column in read(path, wanted, start.record):
            for row in range(max(first, start.record), first + len(column)):
                record_id = f"{name}:{row}"
                try:
                    record = {field: column[row - first].as_py()}
                    yield document_of(record_id, record, wanted, Place(start.epoch, start.file, row))
                except UnicodeDecodeError:
                    yield Fault(record_id, "not UTF-8", [field])
                except (ValueError, OverflowError) as error:  # of a column of dates, say
                    yield Fault(record_id, f"column {field!r} is no text ({one_line(error)})", [field])
    except _NoColumn as error:
        yield Fault(name, f"no column {field!r}", error.args[0])
    except (pyarrow.ArrowException, UnicodeDecodeError) as error:  # the latter of a column's name
        raise OSError(f"damaged or truncated data of a table ({one_line(error)})") from error


def parquet(path: Path, wanted: Wanted, start: int) -> Columns:
    """The column of a parquet file; groups of rows before `start` are not read.

    Raises OSError for a group that unpacks to far more than text does: pyarrow holds a page, however large, whole.
    """
    import pyarrow.parquet

    first, field, size = 0, wanted.text_field, path.stat().st_size
    with pyarrow.parquet.ParquetFile(path, buffer_size=CHUNK) as file:
        if field not in file.schema_arrow.names:
            raise _NoColumn(file.schema_arrow.names)
        for group in range(file.num_row_groups):
            about = file.metadata.row_group(group)
            if first + about.num_rows <= start:
                first += about.num_rows
                continue
            if about.total_byte_size > max(wanted.max_bytes, PARQUET_TIMES * size):
                raise OSError(f"{size_of(about.total_byte_size)} would be unpacked from a file of {size_of(size)}")
            for batch in file.iter_batches(PARQUET_ROWS, row_groups=[group], columns=[field]):
                yield first, batch.column(0)
                first += len(batch)


def arrow(path: Path, wanted: Wanted, start: int) -> Columns:
    """The column of arrow's stream, which `datasets` saves, or of its file, which others call feather."""
    import pyarrow

    first, field = 0, wanted.text_field
    with pyarrow.memory_map(str(path)) as source:
        if source.read(6) == b"ARROW1":
            file = pyarrow.ipc.open_file(source)
            schema, batches = file.schema, map(file.get_batch, range(file.num_record_batches))
        else:
            source.seek(0)
            batches = pyarrow.ipc.open_stream(source)
            schema = batches.schema
        if field not in schema.names:
            raise _NoColumn(schema.names)
        for batch in batches:
            if first + len(batch) > start:
                column = batch.column(schema.names.index(field))
                column.validate(full=True)  # pyarrow trusts the offsets in a file
                yield first, column
            first += len(batch)


FORMS = {b"PAR1": parquet, b"ARROW1": arrow, b"\xff\xff\xff\xff": arrow}  # by the first bytes
