"""What a plugin imports: one list of names, and nothing behind it but errors."""

from __future__ import annotations

import subprocess
import sys

import pytest

import kdzoo
from kdzoo import api


def test_kdzoo_offers_the_names_of_its_contract_and_no_other():
    assert kdzoo.__all__ == api.__all__
    assert all(getattr(kdzoo, name) is getattr(api, name) for name in api.__all__)


def test_the_list_is_sorted_and_names_what_its_modules_define():
    assert [*api.__all__] == sorted(set(api.__all__))


def test_a_name_that_is_not_public_is_not_there():
    for name in ("Los", "Visit", "VocabularyPass"):
        with pytest.raises(AttributeError, match=rf"^module 'kdzoo' has no attribute '{name}'$"):
            getattr(kdzoo, name)


def test_the_version_is_known_without_the_contract():
    code = "import sys, kdzoo; assert kdzoo.__version__; print('torch' in sys.modules, 'kdzoo.api' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "False False\n"


@pytest.mark.slow
def test_the_contract_brings_no_other_room_along():
    code = (
        "import sys, kdzoo.api; "
        "print(*sorted({name.split('.')[1] for name in sys.modules if name.startswith('kdzoo.')}))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "api errors\n"
