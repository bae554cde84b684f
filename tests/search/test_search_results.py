"""What a search writes, as records."""

from pathlib import Path

import pytest

from mmkt_ray import storage
from mmkt_ray.errors import DataError
from mmkt_ray.search.search_results import SearchResult, SearchSummary
from tests.report.test_searched import insight, result


@pytest.mark.parametrize(("record", "content"), [(SearchResult, result()), (SearchSummary, insight(5))])
def test_files_of_earlier_searches_are_read_and_stay_as_they_are(record, content, tmp_path):
    """Catches a key that earlier files lack and a value that reading changes: such a run would have no report."""
    before, after = tmp_path / "before.json", tmp_path / "after.json"
    storage.write_json(str(before), content)
    record.read(str(before)).write(str(after))
    assert Path(after).read_bytes() == Path(before).read_bytes()


def test_another_key_is_refused(tmp_path):
    """Catches a misspelt key that is read as nothing."""
    file = str(tmp_path / "result.json")
    storage.write_json(file, result() | {"winer": "candidate 1"})
    with pytest.raises(DataError, match="unknown key 'winer'"):
        SearchResult.read(file)
