# demo, serve and test need only python3: each sets up .venv by itself.
.PHONY: demo serve test check format clean

QUESTION = Tom has 3 boxes of 4 pens and gives away 5. How many pens are left?
POLICY = priced-vote:price=0.022

demo:
	@scripts/setup core
	@.venv/bin/coterie generate "$(QUESTION)" --policy $(POLICY) --compare-vanilla

serve:
	@scripts/setup serve
	@.venv/bin/coterie serve

test:
	@scripts/test

check:
	@scripts/check

format:
	@scripts/format

clean:
	rm -rf .venv .pytest_cache .ruff_cache .hypothesis .import_linter_cache build dist
