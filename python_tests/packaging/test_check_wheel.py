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
#include <cmath>
#include <string>
#include <vector>
extern "C" int aoti_torch_get_dim(void*, long*);
extern "C" int aoti_torch_get_current_cuda_stream(int, void**);
extern "C" int torch_get_num_threads(unsigned*);
namespace c10 { inline int defined_here(int x) { return x + 1; } }
extern "C" int f(std::string* s, void* t) {
  s->append(std::to_string(std::log(double(s->size()))));
  std::vector<void*> streams(s->size());
  aoti_torch_get_current_cuda_stream(0, streams.data());
  torch_get_num_threads(nullptr);
  return c10::defined_here(aoti_torch_get_dim(t, nullptr));
}
"""
FAULTY = {
    "function of at::": "namespace at { void f(); } void g() { at::f(); }",
    "member of c10::": "namespace c10 { struct S { int f() const; }; } int g(c10::S& s) { return s.f(); }",
    "argument of torch::": "namespace torch { struct T; } void f(torch::T&); void g(torch::T& t) { f(t); }",
    "type information of c10::": "namespace c10 { struct E { virtual ~E(); }; } void g() { throw c10::E(); }",
    "CPython": 'extern "C" void PyList_New(long); void g() { PyList_New(1); }',
    "shared CUDA runtime": 'extern "C" int cudaMalloc(void**, unsigned long); void g() { cudaMalloc(nullptr, 1); }',
    "function that no shim declares": 'extern "C" void torch_no_such_shim(); void g() { torch_no_such_shim(); }',
    "C++ function of nobody": "namespace other { void f(); } void g() { other::f(); }",
}


def compile_library(source, folder, *flags):
    (folder / "source.cpp").write_text(source)
    library = folder / "_C.abi3.so"
    subprocess.run(["g++", "-shared", "-fPIC", folder / "source.cpp", "-o", library, *flags], check=True)
    return library


def pack(library, wheel, members=check_wheel.REQUIRED):
    with zipfile.ZipFile(wheel, "w") as archive:
        for member in members:
            archive.writestr(member, library.read_bytes() if member.endswith(".so") else "")
    return wheel


def test_clean_wheel(tmp_path, capsys):
    wheel = pack(compile_library(CLEAN, tmp_path), tmp_path / "fewshot_ext-1.0-cp310-abi3-linux_x86_64.whl")
    with pytest.raises(SystemExit) as finished:
        check_wheel.main([str(wheel)])
    assert not finished.value.code
    assert "stable ABI" in capsys.readouterr().out


@pytest.mark.parametrize("name", FAULTY)
def test_unstable_symbol(tmp_path, name):
    faults = check_wheel.library_faults(compile_library(FAULTY[name], tmp_path))
    assert faults
    assert all(fault.startswith("_C.abi3.so: ") and "symbol of" in fault for fault in faults)


def test_names_that_only_look_alike_are_not_taken_for_libtorchs():
    fault = check_wheel.symbol_fault("_ZN4chat4whatERNS_3batE", "")
    assert fault == "symbol of neither the stable ABI nor the C and C++ runtime: _ZN4chat4whatERNS_3batE"


def test_shims_count_by_their_name_where_no_torch_is_installed(tmp_path, monkeypatch):
    monkeypatch.setattr(check_wheel, "declared_shims", frozenset)
    assert check_wheel.library_faults(compile_library(CLEAN, tmp_path)) == []
    faults = check_wheel.library_faults(compile_library(FAULTY["shared CUDA runtime"], tmp_path))
    assert [fault.rpartition(" ")[2] for fault in faults] == ["cudaMalloc"]


def test_library_that_other_machines_need_not_have(tmp_path):
    (tmp_path / "empty.cpp").touch()
    other = tmp_path / "libcudart.so.13"
    subprocess.run(["g++", "-shared", tmp_path / "empty.cpp", "-o", other, f"-Wl,-soname,{other.name}"], check=True)
    library = compile_library(CLEAN, tmp_path, "-Wl,--no-as-needed", other)
    assert check_wheel.library_faults(library) == ["_C.abi3.so: needs libcudart.so.13"]


def test_exported_cuda_runtime(tmp_path):
    library = compile_library('extern "C" int cudaMalloc(void**, unsigned long) { return 0; }', tmp_path)
    assert check_wheel.library_faults(library) == ["_C.abi3.so: exports the CUDA runtime's cudaMalloc"]


def test_wheel_without_cuda_is_at_fault_where_cuda_is_required(tmp_path):
    library = compile_library(CLEAN, tmp_path)
    wheel = pack(library, tmp_path / "fewshot_ext-1.0-cp310-abi3-linux_x86_64.whl")
    assert check_wheel.wheel_faults(wheel) == []
    assert check_wheel.wheel_faults(wheel, require_cuda=True) == ["fewshot_ext/_C_cuda.abi3.so is missing"]
    pack(library, wheel, (*check_wheel.REQUIRED, check_wheel.CUDA_LIBRARY))
    with pytest.raises(SystemExit) as finished:
        check_wheel.main(["--require-cuda", str(wheel)])
    assert not finished.value.code


def test_wrong_tag_and_missing_member(tmp_path, capsys):
    library = compile_library(CLEAN, tmp_path)
    wheel = pack(library, tmp_path / "fewshot_ext-1.0-cp311-cp311-linux_x86_64.whl", check_wheel.REQUIRED[:1])
    with pytest.raises(SystemExit) as finished:
        check_wheel.main([str(wheel)])
    assert finished.value.code
    told = capsys.readouterr().out
    assert "lacks the tag cp310-abi3" in told
    assert "fewshot_ext/_build_info.json is missing" in told
