"""Numbers that others published, as data: every value with its source, and whether it was confirmed."""

from evaluation.published.tables import BesideRow, PublishedTable, as_markdown, beside, load_table, table_ids

__all__ = ["BesideRow", "PublishedTable", "as_markdown", "beside", "load_table", "table_ids"]
