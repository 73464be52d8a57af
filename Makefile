# What people do with this project, by name. `make` alone lists it.
# Needed beforehand: Python 3.11 or newer (another one: `make demo PYTHON=python3.12`), git, make.
# Every path here is relative, so the folder may lie anywhere, under any name.
PYTHON ?= python3
VENV ?= .venv
bin := $(VENV)/bin
ready := $(VENV)/ready
older := .cache/transformers-4.57
newest := .cache/newest
constraints := $(wildcard .ci/constraints.txt)

.DEFAULT_GOAL := help
.PHONY: help demo test lab mine export check notebooks test-slow test-gpu test-older test-newest test-llama torture fuzz clean

help: ## this list
	@awk -F ':.*## ' '/^[a-z-]+:.*## / {printf "  make %-11s  %s\n", $$1, $$2}' Makefile

demo: $(ready) ## corpus, tokenizer, shards, training, evaluation and three stories, in minutes on a CPU
	@"$(bin)/llm-course" demo

test: $(ready) ## every notebook, then every quick test
	OMP_NUM_THREADS=1 "$(bin)/nbdev_test" --path nbs  # it runs as many notebooks at a time as there are processors
	LLM_COURSE_PROGRAMS=all "$(bin)/python" -m pytest -n auto --dist loadfile -m "not slow and not llama"

# JupyterLab refuses to run as root, as one is in many containers, unless it is told that this is meant.
COURSE ?= nbs
as_root = $(if $(filter 0,$(shell id -u)),--allow-root)
lab: $(ready) ## open the course in JupyterLab; `make lab COURSE=mine` opens your copy
	@[ -e "$(COURSE)/index.ipynb" ] || { echo "There is no $(COURSE)/index.ipynb. For a copy of your own: make mine"; exit 1; }
	"$(bin)/jupyter" lab $(as_root) --ServerApp.root_dir=. "--LabApp.default_url=/lab/tree/$(COURSE)/index.ipynb"

mine: ## copy the notebooks to mine/, where git leaves your answers alone; what lies there stays as it is
	@mkdir -p mine/.originals
	@for file in nbs/*.ipynb; do name="$${file##*/}"; \
	  if [ ! -e "mine/$$name" ] && [ ! -L "mine/$$name" ]; then \
	    cp "$$file" "mine/.originals/$$name" && cp "$$file" "mine/$$name" && echo "  mine/$$name" || exit 1; \
	  elif [ -e "mine/.originals/$$name" ] && ! cmp -s "$$file" "mine/.originals/$$name"; then \
	    echo "  mine/$$name stays as it is, and nbs/ has a newer version: rename yours and run \`make mine\` again to get it"; fi; done
	@echo "Your copy of the course is in mine/. Open it: make lab COURSE=mine"

export: $(ready) ## write llm_course/ from nbs/
	"$(bin)/nbdev_export"

check: $(ready) ## llm_course/ is what nbs/ exports, the notebooks are clean, the code is linted and its types are checked, the plain code is short
	"$(bin)/nbdev_export"
	"$(bin)/nbdev_clean"
	@git status --porcelain --untracked-files=all -- llm_course nbs > "$(VENV)/differs"
	@git --no-pager diff -- llm_course
	@if [ -s "$(VENV)/differs" ]; then cat "$(VENV)/differs"; \
	  echo "These files differ from the last commit after nbdev_export and nbdev_clean: look at them, then commit them."; exit 1; fi
	"$(bin)/ruff" check
	"$(bin)/ruff" format --check
	env -u PYTHONPATH "$(bin)/ty" check --quiet --python "$(VENV)"
	@OMP_NUM_THREADS=1 "$(bin)/python" tests/plain_size.py

notebooks: $(ready) ## run every notebook in place, which is how the outputs in git are made
	"$(bin)/python" -m nbconvert --to notebook --execute --inplace --ExecutePreprocessor.timeout=300 nbs/*.ipynb
	"$(bin)/nbdev_clean"

test-slow: $(ready) ## the tests and the cells that take minutes
	"$(bin)/nbdev_test" --path nbs --flags slow
	"$(bin)/python" -m pytest -m slow || [ $$? -eq 5 ]  # 5: there is none

test-gpu: $(ready) ## the tests that need a CUDA device
	"$(bin)/python" -m pytest -m gpu

fuzz: $(ready) ## hostile files and round trips, 10,000 cases for every reader and 20,000 texts: half an hour
	LLM_COURSE_CASES=10000 OMP_NUM_THREADS=1 "$(bin)/python" -m pytest tests/test_hostile.py tests/test_round_trips.py

test-older: $(ready) $(older)/ready ## the tests beside transformers with an older version of it
	PYTHONPATH="$(CURDIR)/$(older)" "$(bin)/python" -c "from transformers import __version__ as v; assert v.startswith('4.57.'), v"
	PYTHONPATH="$(CURDIR)/$(older)" "$(bin)/python" -m pytest tests/test_transformers.py "--record=transformers 4.57: transformers tokenizers torch"

# Not beside the environment, since another torch wants other packages throughout. No constraints: what a user's pip would take today.
core := attention gpt training sampling evaluation speed inside transformers
test-newest: ## the core's tests with the newest PyTorch that settings.ini admits, in an environment of its own
	@test -x "$(newest)/bin/python" || "$(PYTHON)" -m venv "$(newest)"
	"$(newest)/bin/python" -m pip install --disable-pip-version-check --upgrade torch transformers -e ".[sharing]" pytest hypothesis
	@"$(newest)/bin/python" -c "import torch; print('torch', torch.__version__)"
	OMP_NUM_THREADS=1 "$(newest)/bin/python" -m pytest -m "not slow" $(core:%=tests/test_%.py)

# Built for any processor of the last ten years, not for this one, so that the wheel can move, and because GCC 12 makes code for
# Intel's newest ones that crashes (https://github.com/ggml-org/llama.cpp/issues/20824). To build it anew: delete .cache/llama.
llama := 0.3.36
test-llama: $(ready) ## open a saved model in llama.cpp, built from its source the first time: minutes, with a C++ compiler
	@ls .cache/llama/llama_cpp_python-$(llama)-*.whl > /dev/null 2>&1 || { \
	  echo "Building llama.cpp into .cache/llama: once, some minutes."; CMAKE_ARGS="-DGGML_NATIVE=OFF" \
	  "$(bin)/python" -m pip wheel --disable-pip-version-check --no-deps --no-cache-dir --no-binary llama-cpp-python \
	    --wheel-dir .cache/llama llama-cpp-python==$(llama); }
	"$(bin)/python" -m pip install --disable-pip-version-check --only-binary llama-cpp-python \
	  --find-links .cache/llama llama-cpp-python==$(llama)
	"$(bin)/python" -m pytest -m llama "--record=llama.cpp: llama-cpp-python gguf torch"

N ?= 200
torture: $(ready) ## kill N=200 training processes, resume them, and compare with runs that were never killed
	"$(bin)/python" tests/torture.py --kills "$(N)" --seed 0

clean: ## remove the environment and the caches; data/ and artifacts/ stay
	rm -rf "$(VENV)" "$(older)" "$(newest)" build dist *.egg-info .pytest_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +

# The environment is made once, and again when a file that describes it changes. (pyproject.toml does not count: nbdev_export
# touches it every time.)
$(ready): settings.ini setup.py
	@"$(PYTHON)" -c "import sys; sys.exit(sys.version_info < (3, 11) and 'llm_course needs Python 3.11 or newer, and this is ' + sys.version.split()[0] + '. Try: make PYTHON=python3.12')"
	@echo "Making the environment in $(VENV): once, some minutes, most of them for PyTorch."
	"$(PYTHON)" -m venv "$(VENV)"
	"$(bin)/python" -m pip install --disable-pip-version-check $(addprefix --constraint ,$(constraints)) -e ".[dev]"
	@touch "$@"

# Beside the environment, and put in front of it: transformers and the two packages that go by its version. All else is shared.
$(older)/ready: $(ready)
	rm -rf "$(older)"
	"$(bin)/python" -m pip install --disable-pip-version-check --no-deps --target "$(older)" \
	  "transformers==4.57.*" "tokenizers==0.22.*" "huggingface-hub==0.36.*"
	@touch "$@"
