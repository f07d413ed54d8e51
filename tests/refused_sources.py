"""What must not open says so in one line."""

import pytest

from genvision.data.sources import open_source
from genvision.errors import UserError


def refused(spec, *words):
    with pytest.raises(UserError) as caught:
        open_source(str(spec))
    assert "\n" not in str(caught.value)
    for word in words:
        assert word in str(caught.value)
