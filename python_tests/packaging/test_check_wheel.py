"""The wheel check finds what would tie a library to one torch or one CPython."""

import importlib.util
import shutil
import subprocess
import zipfile
from pathlib import Path

import pytest

spec = importlib.util.spec_from_file_location("check_wheel", Path(__file__).with_name("check_wheel.py"))
check_wheel = importlib.util.module_from_spec(spec)
spec.loader.exec_module(check_wheel)

pytestmark = pytest.mark.skipif(not shutil.which("g++"), reason="compiles small libraries with g++")

CLEAN = """
#include <string>
extern "C" int aoti_torch_get_dim(void*, long*);
namespace c10 { inline int defined_here(int x) { return x + 1; } }
extern "C" int f(std::string* s, void* t) {
  s->append("x");
  return c10::defined_here(aoti_torch_get_dim(t, nullptr));
}
"""
FAULTY = {
    "function of at::": "namespace at { void f(); } void g() { at::f(); }",
    "member of c10::": "namespace c10 { struct S { int f() const; }; } int g(c10::S& s) { return s.f(); }",
    "argument of torch::": "namespace torch { struct T; } void f(torch::T&); void g(torch::T& t) { f(t); }",
    "type information of c10::": "namespace c10 { struct E { virtual ~E(); }; } void g() { throw c10::E(); }",
    "CPython": 'extern "C" void PyList_New(long); void g() { PyList_New(1); }',
}


def compile_library(source, folder):
    (folder / "source.cpp").write_text(source)
    library = folder / "_C.abi3.so"
    subprocess.run(["g++", "-shared", "-fPIC", folder / "source.cpp", "-o", library], check=True)
    return library


def pack(library, wheel, members=check_wheel.REQUIRED):
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in members:
            archive.writestr(member, library.read_bytes() if member.endswith(".so") else "")
    return wheel


def test_clean_wheel(tmp_path, capsys):
    wheel = pack(compile_library(CLEAN, tmp_path), tmp_path / "fewshot_ext-1.0-cp310-abi3-linux_x86_64.whl")
    with pytest.raises(SystemExit) as finished:
        check_wheel.main([wheel])
    assert not finished.value.code
    assert "stable ABI" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAULTY)
def test_unstable_symbol(tmp_path, name):
    faults = check_wheel.library_faults(compile_library(FAULTY[name], tmp_path))
    assert faults
    assert all(fault.startswith("_C.abi3.so: ") and "symbol of" in fault for fault in faults)


def test_names_that_only_look_alike_pass(tmp_path):
    source = "namespace chat { struct bat; void what(bat&); } void g(chat::bat& bat) { chat::what(bat); }"
    assert check_wheel.library_faults(compile_library(source, tmp_path)) == []


def test_wrong_tag_and_missing_member(tmp_path, capsys):
    library = compile_library(CLEAN, tmp_path)
    wheel = pack(library, tmp_path / "fewshot_ext-1.0-cp311-cp311-linux_x86_64.whl", check_wheel.REQUIRED[:1])
    with pytest.raises(SystemExit) as finished:
        check_wheel.main([wheel])
    assert finished.value.code
    told = capsys.readouterr().out
    assert "lacks the tag cp310-abi3" in told
    assert "fewshot_ext/_build_info.json is missing" in told
