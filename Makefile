# Every target works from a fresh clone: Python 3.10 or later with venv, make and g++ are all it takes.
#
#   make test PYTHON=python3.12
#   make test TORCH="torch==2.13.0 --index-url https://download.pytorch.org/whl/cpu"

PYTHON ?= python3
# Pinned here and not in the package metadata: what is installed first decides what the build compiles against.
TORCH ?= torch==2.13.0
# Three equals signs take the build without a local label, on PyPI the one with CUDA, whoever offers a +cpu beside it.
CUDA_TORCH ?= torch===2.13.0
VENV ?= .venv
CUDA_VENV ?= .venv-cuda
# NVIDIA's own packages: compiler, headers and runtime in one folder that serves as CUDA_HOME. All parts are named, because
# nvcc asks for its others in any release.
CUDA_TOOLKIT ?= cuda-toolkit[nvcc,crt,nvvm,cudart,cccl]==13.0.2
CUDA_TOOLKIT_FOLDER ?= .cuda-toolkit
PYTEST_ARGS ?=
PROCESSES ?= auto
REPORT_ARGS ?=
DEMO_ARGS ?= --output demo_output

BIN := $(VENV)/bin
PIP := $(BIN)/python -m pip --disable-pip-version-check
SCHEMA := $(BIN)/check-jsonschema --builtin-schema
NATIVE := $(shell find csrc 2>/dev/null)
FORMATTED := $(filter %.h %.cpp %.cuh %.cu,$(NATIVE) $(shell find python_tests 2>/dev/null))
BUILD := pyproject.toml setup.py $(wildcard build_backend/*.py)

.DEFAULT_GOAL := help
.PHONY: help demo test test-slow bench gpu-report lint format sdist wheel wheel-cuda check-cuda cuda-toolkit sanitize torch-requirement clean
# Two pips must not write to one environment at a time.
.NOTPARALLEL:

help:  ## List the targets
	@grep -E '^[a-z-]+:.*  ## ' $(MAKEFILE_LIST) | sed -E 's/:.*  ## /\t/' | expand -t 14
	@echo "Variables: PYTHON=$(PYTHON) TORCH=\"$(TORCH)\" VENV=$(VENV) PYTEST_ARGS PROCESSES=$(PROCESSES) DEMO_ARGS REPORT_ARGS"
	@echo "           CUDA_TORCH=\"$(CUDA_TORCH)\" CUDA_VENV=$(CUDA_VENV) TORCH_CUDA_ARCH_LIST MAX_JOBS"

demo: $(VENV)/.train  ## Pre-train with five margins on real images, evaluate few-shot accuracy, draw the figure
	$(BIN)/fewshot-ext demo $(DEMO_ARGS)

test: $(VENV)/.test  ## Run the tests
	$(BIN)/pytest --numprocesses $(PROCESSES) --dist worksteal $(PYTEST_ARGS)

test-slow: $(VENV)/.test  ## Run the tests marked slow
	$(BIN)/pytest -m slow $(PYTEST_ARGS)

bench: $(VENV)/.bench  ## Time the operators against their peers
	set -e; for script in benchmarks/bench_*.py; do $(BIN)/python $$script; done

gpu-report: $(VENV)/.gpu  ## Test and time the package on this machine's GPU (TORCH names a build with CUDA)
	$(BIN)/python benchmarks/gpu_report.py $(REPORT_ARGS)

lint: $(VENV)/.dev  ## Check style and format of the code, and the files that GitHub, PyPI and a citation need
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/clang-format --dry-run -Werror $(FORMATTED)
	$(BIN)/shellcheck .ci/run
	$(BIN)/validate-pyproject pyproject.toml
	$(BIN)/actionlint -shellcheck $(BIN)/shellcheck .github/workflows/*.yml
	$(SCHEMA) custom.github-workflows-require-timeout .github/workflows/*.yml
	$(SCHEMA) vendor.github-issue-forms $(filter-out %/config.yml,$(wildcard .github/ISSUE_TEMPLATE/*.yml))
	$(SCHEMA) vendor.github-issue-config .github/ISSUE_TEMPLATE/config.yml
	$(SCHEMA) vendor.dependabot .github/dependabot.yml
	$(SCHEMA) vendor.citation-file-format CITATION.cff

format: $(VENV)/.dev  ## Rewrite Python, C++ and CUDA in the project's format
	$(BIN)/ruff check --fix .
	$(BIN)/ruff format .
	$(BIN)/clang-format -i $(FORMATTED)

# An egg-info folder left from earlier would bring files along that have been deleted since.
sdist: $(VENV)/.build  ## Build the source distribution into dist/
	rm -rf dist *.egg-info
	$(BIN)/python -m build --sdist --outdir dist .

# Wheels come from the source distribution, as they do for whoever installs it: what it lacks is missed here, and pip
# unpacks it where there is no git.
wheel: sdist $(VENV)/.torch  ## Build the source distribution and from it the wheel into dist/
	$(PIP) wheel --no-deps --wheel-dir dist dist/*.tar.gz

# The verbose log is where ptxas reports what each kernel takes.
wheel-cuda: sdist $(VENV)/.torch  ## Build the wheel with the CUDA library, show what each kernel takes, and check both
	mkdir -p build
	FEWSHOT_EXT_CUDA=1 $(PIP) wheel --verbose --no-deps --wheel-dir dist dist/*.tar.gz > build/wheel.log 2>&1 \
		|| (cat build/wheel.log; exit 1)
	@grep -o 'fewshot_ext: built .*' build/wheel.log
	$(BIN)/python python_tests/packaging/kernel_resources.py build/wheel.log
	$(BIN)/python python_tests/packaging/kernel_budgets.py build/wheel.log dist/*.whl
	$(BIN)/python python_tests/packaging/check_wheel.py --require-cuda dist/*.whl

# Not part of continuous integration, because a torch with CUDA takes 5 GB.
check-cuda: wheel-cuda  ## Show, without a GPU, that a CUDA torch finds a kernel for every operator (downloads 3 GB)
	$(PYTHON) -m venv $(CUDA_VENV)
	$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check uninstall --quiet --yes fewshot_ext
	$(CUDA_VENV)/bin/python -m pip --disable-pip-version-check install $(CUDA_TORCH) dist/*.whl
	$(CUDA_VENV)/bin/python -I python_tests/packaging/check_cuda.py

sanitize: $(VENV)/.dev  ## Run the operator tests under AddressSanitizer and UndefinedBehaviorSanitizer
	$(BIN)/cmake -S . -B build/sanitize -G Ninja -DPython_EXECUTABLE=$(abspath $(BIN)/python) \
		-DCMAKE_MAKE_PROGRAM=$(abspath $(BIN)/ninja) -DFEWSHOT_EXT_SANITIZE=ON -DFEWSHOT_EXT_CUDA=OFF
	$(BIN)/cmake --build build/sanitize --target sanitize

cuda-toolkit:  ## Install a CUDA compiler from PyPI; CUDA_HOME=$PWD/.cuda-toolkit/nvidia/cu13 then names it
	$(PYTHON) -m pip --disable-pip-version-check install --upgrade --target $(CUDA_TOOLKIT_FOLDER) '$(CUDA_TOOLKIT)'

torch-requirement:
	@echo '$(TORCH)'

clean:  ## Remove everything that was built, the environment included
	rm -rf .venv .venv-cuda .cuda-toolkit .cache/simt build dist *.egg-info demo_output .pytest_cache .ruff_cache .hypothesis compile_commands.json
	rm -f fewshot_ext/*.so fewshot_ext/_build_info.json

# The install is editable: tests then run the checkout itself, the one folder with both the sources under test and a
# compiled library, whatever the working directory; and an edited Python file needs no reinstall. A change of native
# code or of the build does, and the stamps notice; folders are among the prerequisites to notice a deleted file.
$(VENV)/.created:
	$(PYTHON) -m venv $(VENV)
	touch $@

$(VENV)/.torch: $(VENV)/.created
	$(BIN)/python -c "import torch" 2>/dev/null || $(PIP) install $(TORCH)
	touch $@

# Without a GPU the CUDA library would take minutes to compile and be loaded by nothing.
$(VENV)/.package: $(VENV)/.torch $(BUILD) $(NATIVE)
	cuda=$$($(BIN)/python -c "import torch; print('' if torch.cuda.is_available() else 0)"); \
		FEWSHOT_EXT_CUDA=$${FEWSHOT_EXT_CUDA-$$cuda} $(PIP) install --editable .
	touch $@

$(VENV)/.build: $(VENV)/.created
	$(PIP) install build
	touch $@

# By its name and not by ".", because that would compile again only to add requirements.
$(VENV)/.train $(VENV)/.test $(VENV)/.bench $(VENV)/.gpu $(VENV)/.dev: $(VENV)/.package
	$(PIP) install 'fewshot_ext[$(EXTRAS)]'
	touch $@

$(VENV)/.train: EXTRAS := train
$(VENV)/.test: EXTRAS := train,test
$(VENV)/.bench: EXTRAS := bench
$(VENV)/.gpu: EXTRAS := train,test,bench-cuda
$(VENV)/.dev: EXTRAS := train,test,dev
