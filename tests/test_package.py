"""The installed package: what it imports, what it is made of, and what it says about itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import fastpref
from fastpref import _native

CHECKOUT = Path(__file__).parents[1]


def python(code, cwd, **environment):
    return subprocess.run(
        [sys.executable, "-c", code], cwd=cwd, env={**os.environ, **environment}, capture_output=True, text=True
    )


def test_tests_meet_the_installed_package():
    assert CHECKOUT not in Path(fastpref.__file__).parents
    assert _native._core is not None, _native.cpu_missing()


def test_public_names():
    assert set(fastpref.__all__) == {
        "CudaError",
        "PreferenceOutput",
        "SequenceLogps",
        "TokenStats",
        "__version__",
        "build_info",
        "curate",
        "losses",
        "preference_loss",
        "sequence_logps",
        "set_simd_level",
        "token_logps",
    }
    for name in fastpref.__all__:
        getattr(fastpref, name)
    with pytest.raises(AttributeError, match="module 'fastpref' has no attribute 'nothing'"):
        _ = fastpref.nothing


def test_curate_and_the_package_itself_do_not_import_torch(tmp_path):
    code = "import sys, fastpref, fastpref.curate; fastpref.curate.select_pairs; sys.exit('torch' in sys.modules)"
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize("first", ["fastpref.token_logps", "fastpref.preference"])
def test_a_submodule_never_hides_the_function_of_its_name(tmp_path, first):
    code = f"import {first}, fastpref; assert callable(fastpref.token_logps); fastpref.losses.LOSSES['rdpo']"
    result = python(code, tmp_path)
    assert result.returncode == 0, result.stderr


def test_the_bare_source_tree_says_how_to_install():
    result = python("import fastpref", CHECKOUT)
    assert result.returncode != 0
    assert "bare source tree" in result.stderr
    assert "pip install ." in result.stderr


def test_build_info():
    info = fastpref.build_info()
    assert info["version"] == fastpref.__version__ == info["native"]["version"]
    backends = info["backends"]["token_logps"]
    assert set(backends) == {"cpu", "cuda"}
    assert backends["cpu"]["native"] == "available"
    assert backends["cpu"]["reference"] == "available"
    assert "openmp" in info["native"]["threads"] or info["native"]["threads"] == "std::thread"


def test_simd_level_by_environment(tmp_path):
    code = "import fastpref; print(fastpref.build_info()['native']['simd'])"
    assert python(code, tmp_path, FASTPREF_SIMD="baseline").stdout.strip() == "baseline"
    wrong = python(code, tmp_path, FASTPREF_SIMD="mmx")
    assert "simd level must be 'auto', 'baseline', 'avx2' or 'avx512', got 'mmx'" in wrong.stderr


def test_without_a_native_core_the_reference_serves_and_says_so(tmp_path):
    hide = "import sys; sys.modules['fastpref._core'] = None\n"
    code = hide + (
        "import warnings, torch, fastpref\n"
        "with warnings.catch_warnings(record=True) as seen:\n"
        "    warnings.simplefilter('always')\n"
        "    x = torch.randn(2, 4, 9, requires_grad=True)\n"
        "    y = torch.zeros(2, 4, dtype=torch.long)\n"
        "    fastpref.preference_loss(x, y, ref_logits=x.detach()).loss.backward()\n"
        "    fastpref.token_logps(x, y)\n"
        "assert [w.category for w in seen] == [RuntimeWarning], seen\n"
        "assert 'slow reference' in str(seen[0].message)\n"
        "print(fastpref.build_info()['native'])\n"
    )
    result = python(code, tmp_path, TRITON_INTERPRET="0", FASTPREF_EXPECT_NATIVE="0")
    assert result.returncode == 0, result.stderr
    assert "no native core" in result.stdout
    expected = python(hide + "import fastpref; fastpref.build_info()", tmp_path, FASTPREF_EXPECT_NATIVE="1")
    assert expected.returncode != 0
