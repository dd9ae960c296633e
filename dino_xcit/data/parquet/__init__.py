"""Images in Parquet files, each read on its own.

From the file inwards: which columns are meant (columns), where they lie (footer, in Thrift's notation: thrift), their
pages (pages), each value in a page (values, snappy); a file looked through once (scan), and read ever after (source).
"""

from dino_xcit.data.parquet.source import ParquetSource, is_folder_of_parquet, open_parquet

__all__ = ["ParquetSource", "is_folder_of_parquet", "open_parquet"]
