"""Tables of captions as people write them: one object a line (.jsonl), columns of a spreadsheet (.csv), or .parquet."""

import csv
import io
import posixpath
from collections.abc import Iterator
from typing import Any

from ldm.io.text import decode_text, parse_jsonl
from ldm.utils.errors import DataError

Row = tuple[str, dict[str, Any]]  # where it stands, for errors; column -> value
DELIMITERS = ",;\t"


def read_table(data: bytes, name: str) -> Iterator[Row]:
    """The rows of a table, of the kind that the suffix of its name says. Raises DataError."""
    return READERS[posixpath.splitext(name)[1].lower()](data, name)


def parse_csv(data: bytes, name: str) -> Iterator[Row]:
    """The rows of CSV text below its line of column names, with commas, semicolons or tabs. Raises DataError."""
    text = decode_text(data, name)
    delimiter = max(DELIMITERS, key=text.partition("\n")[0].count)
    reader = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, skipinitialspace=True, strict=True)
    columns: list[str] = []
    try:
        for values in reader:
            if not any(values):
                continue
            if not columns:
                columns = [value.strip() for value in values]
                continue
            where = f"{name}:{reader.line_num}"
            if len(values) > len(columns):
                problem = f"{len(values)} values for {len(columns)} columns"
                raise DataError(f"{where}: {problem}; put a text with {delimiter!r} in it into double quotes")
            yield where, dict(zip(columns, values, strict=False))
    except csv.Error as error:
        raise DataError(f"{name}:{reader.line_num}: cannot be read as CSV ({error})") from error


def parse_parquet(data: bytes, name: str) -> Iterator[Row]:
    """The rows of a parquet file; needs pyarrow. Raises DataError."""
    try:
        from pyarrow import BufferReader, parquet
    except ImportError:
        advice = "pip install pyarrow, or save it as metadata.csv or metadata.jsonl"
        raise DataError(f"{name}: pyarrow, which reads parquet, is not installed; {advice}") from None
    try:
        rows = parquet.read_table(BufferReader(data)).to_pylist()
    except Exception as error:  # Arrow has a dozen types
        raise DataError(f"{name}: cannot be read as parquet ({' '.join(str(error).split())[:200]})") from error
    for number, row in enumerate(rows, start=1):
        yield f"{name}, row {number}", row


READERS = {".jsonl": parse_jsonl, ".csv": parse_csv, ".parquet": parse_parquet}
