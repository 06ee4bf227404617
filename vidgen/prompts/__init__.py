"""Parquet to rows: finding the files, one schema over all of them, streaming batches, `where` and `limit`.

    dataset    which files, and their columns together        rows    batches of rows
    columns    types of columns

A dataset is a file, a folder, a glob or a Hive-partitioned folder below any fsspec URL; it is read in file order (by
name), row group by row group, and never held whole. A dataset that cannot be read or lacks a column is a PlanError
naming file and column. Refuses to know what a cell means: `vidgen.plan.rows` does.
"""

from vidgen.prompts.columns import holds_binary as holds_binary
from vidgen.prompts.columns import texts as texts
from vidgen.prompts.dataset import SUFFIXES as SUFFIXES
from vidgen.prompts.dataset import Dataset as Dataset
from vidgen.prompts.dataset import open_dataset as open_dataset
from vidgen.prompts.dataset import require as require
from vidgen.prompts.rows import Rows as Rows
from vidgen.prompts.rows import count_chosen as count_chosen
from vidgen.prompts.rows import read as read
from vidgen.prompts.rows import select as select
