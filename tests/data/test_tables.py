"""Tables: what is read, and what a damaged or unfit one says about itself."""

import numpy as np
import pandas as pd
import pytest

from mixtura.data.tables import column, non_finite, numbers, read_table


@pytest.fixture
def write(tmp_path):
    def _write(text: str, name: str = "t.csv"):
        path = tmp_path / name
        path.write_text(text)
        return path

    return _write


TABLE = pd.DataFrame({"length": [1.5, 2.5, 3.5], "count": [1, 2, 3], "kind": ["a", "b", "a"]})


@pytest.mark.parametrize("name", ["t.csv", "t.tsv", "t.parquet", "folder"])
def test_a_table_comes_back_from_every_format(name, tmp_path):
    path = tmp_path / name
    if name == "folder":
        path.mkdir()
        TABLE[:1].to_parquet(path / "a.parquet")
        TABLE[1:].to_parquet(path / "b.parquet")
    elif name.endswith("parquet"):
        TABLE.to_parquet(path)
    else:
        TABLE.to_csv(path, sep="\t" if name.endswith("tsv") else ",", index=False)
    found = read_table(path)
    assert found.columns.tolist() == ["length", "count", "kind"]
    assert found["length"].tolist() == [1.5, 2.5, 3.5] and found["kind"].tolist() == ["a", "b", "a"]


def test_numbers_and_booleans_become_a_matrix(write):
    path = write("a,b,c\n1,true,x\n2.5,false,y\n")
    matrix, names = numbers(read_table(path), without=["c"])
    assert names == ["a", "b"]
    np.testing.assert_array_equal(matrix, [[1, 1], [2.5, 0]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "t.csv is empty"),
        (" \n\n", "t.csv is empty"),
        ("a,b\n", "2 columns and no rows"),
        ("1,2\n3,4\n", "numbers only in its first line"),
        ("a,b\n1,2\n3", r"ends in the middle of a line: the last one holds 1 of 2 fields \('3'\)"),
        ("a,b\n1,2\n3,", "ends in the middle of a line: the last one holds 1 of 2"),
        ('a,b\n1,"x\n3,4\n', "ends in the middle of a line: a quoted field is never closed"),
        ("a,b\n1,2\n3,4,5\n", "no regular table: Expected 2 fields in line 3, saw 3"),
        # pandas alone takes the first field of each line for a row label, and b for what stands under c.
        ("a,b\n1,2,3\n3,4,5\n", r"3 fields a line and only 2 names in its first line \(a, b\)"),
        ("# of today\na,b\n1,2\n", r"2 fields a line and only 1 names in its first line \(# of today\)"),
    ],
)
def test_a_damaged_text_file_says_what_is_wrong(text, message, write):
    with pytest.raises(ValueError, match=message):
        read_table(write(text))


@pytest.mark.parametrize(
    "text",
    [
        "a;b;kind\n1.5;2;x\n-3.25;4;y\n",
        "a;b;kind\n1,5;2;x\n-3,25;4;y\n",  # as a spreadsheet writes it where the decimal mark is a comma
        "a\tb\tkind\n1.5\t2\tx\n-3.25\t4\ty\n",
        '"a";"b";"kind"\r\n"1,5";"2";"x"\r\n"-3,25";"4";"y"\r\n',
    ],
)
def test_fields_between_semicolons_or_tabs_and_decimal_commas_are_read(text, write):
    table = read_table(write(text))
    matrix, names = numbers(table, without=["kind"])
    assert names == ["a", "b"] and table["kind"].tolist() == ["x", "y"]
    np.testing.assert_array_equal(matrix, [[1.5, 2], [-3.25, 4]])


def test_a_comma_in_a_quoted_name_does_not_separate(write):
    assert read_table(write('"a, in m";b\n1;2\n3;4\n')).columns.tolist() == ["a, in m", "b"]


def test_a_semicolon_table_that_is_cut_off_says_so(write):
    with pytest.raises(ValueError, match="ends in the middle of a line: the last one holds 1 of 2"):
        read_table(write("a;b\n1;2\n3"))


@pytest.mark.parametrize("first", [0, 1])
def test_numbers_of_the_rows_are_no_measurement(first, tmp_path, caplog):
    table = TABLE.set_index(np.arange(3) + first)
    table.to_csv(tmp_path / "t.csv")
    matrix, names = numbers(read_table(tmp_path / "t.csv"), without=["kind"])
    assert names == ["length", "count"] and matrix.shape == (3, 2)
    assert "column 'Unnamed: 0' has no name and numbers the rows; it is left out" in caplog.text


def test_a_nameless_column_of_other_numbers_stays(write):
    assert numbers(read_table(write(",a\n0,1\n2,1\n")))[1] == ["Unnamed: 0", "a"]


def test_a_separator_at_the_end_of_every_line_is_no_column(write, caplog):
    matrix, names = numbers(read_table(write("a,b,\n1,2,\n3,4,\n")))
    assert names == ["a", "b"] and np.isfinite(matrix).all()
    assert "column 'Unnamed: 2' has no name and no value; it is left out" in caplog.text


def test_a_column_of_dates_is_named_as_such():
    table = pd.DataFrame({"day": pd.date_range("2020-01-01", periods=2), "a": [1.0, 2.0]})
    with pytest.raises(ValueError, match=r"column 'day' is no column of numbers: it holds datetime64.*2020-01-01"):
        numbers(table)


def test_an_empty_last_field_of_a_finished_line_is_a_missing_value(write):
    assert read_table(write("a,b\n1,2\n3,\n"))["b"].isna().tolist() == [False, True]


def test_files_that_are_no_tables_are_named(write, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none\.csv does not exist"):
        read_table(tmp_path / "none.csv")
    with pytest.raises(ValueError, match=r"t\.xlsx must end in \.csv"):
        read_table(write("a", "t.xlsx"))
    with pytest.raises(ValueError, match="no whole Parquet file"):
        read_table(write("PAR1 and then nothing", "t.parquet"))
    (tmp_path / "folder").mkdir()
    with pytest.raises(ValueError, match="folder without Parquet files"):
        read_table(tmp_path / "folder")
    (tmp_path / "latin.csv").write_bytes("a,b\nä,1\n".encode("latin-1"))
    with pytest.raises(ValueError, match="no UTF-8 text"):
        read_table(tmp_path / "latin.csv")


def test_a_column_of_text_is_named_with_its_first_value(write):
    path = write("a,b\n1,2\n3,four\n5,six\n")
    with pytest.raises(
        ValueError, match=r"column 'b' is no column of numbers: row 1 \(counted from 0\) holds 'four' \(2 of 3 rows"
    ):
        numbers(read_table(path))


def test_missing_and_infinite_values_are_counted_and_placed(write):
    table = read_table(write("a,b\n1,2\n,inf\n3,\n"))
    with pytest.raises(
        ValueError, match=r"2 missing \(NaN\) and 1 infinite \(inf\) values, the first in row 1, column 'a'"
    ):
        numbers(table)
    with pytest.raises(ValueError, match=r"1 infinite \(inf\) values, the first in row 1, column 'b'"):
        numbers(table, missing="allow")
    matrix, _ = numbers(table, without=["b"], missing="allow")
    np.testing.assert_array_equal(matrix, [[1], [np.nan], [3]])


def test_large_finite_values_are_no_infinity():
    assert non_finite(np.full((4, 2), 1.7e308)) is None
    assert "row 12, column 1" in str(non_finite(np.array([[0.0, 0.0], [0.0, np.nan]]), first_row=11))


def test_a_missing_column_is_answered_with_the_close_ones():
    assert column(TABLE, "count").tolist() == [1, 2, 3]
    with pytest.raises(ValueError, match="no column 'Lenght'; close are 'length'"):
        column(TABLE, "Lenght")
    with pytest.raises(ValueError, match="no column 'zzz'; it has 'length', 'count', 'kind'"):
        column(TABLE, "zzz")
    with pytest.raises(ValueError, match="no column is left"):
        numbers(TABLE[["kind"]], without=["kind"])
