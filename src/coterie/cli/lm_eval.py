"""``coterie lm-eval``: lm-evaluation-harness with ``--model coterie`` among its models."""

import typer

from coterie.errors import ConfigError

PASS_THROUGH = {"ignore_unknown_options": True, "allow_extra_args": True, "help_option_names": []}


def lm_eval(context: typer.Context) -> None:
    r"""Run lm-evaluation-harness with `--model coterie`; all options are its own.

    \b
    coterie lm-eval --model coterie --model_args pretrained=FOLDER,policy=des-vote:beta=0.3
      --tasks gsm8k --apply_chat_template
    """
    try:
        from coterie.lab.evals.harness.adapter import run_harness
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("lm_eval", "tqdm"):
            raise
        raise ConfigError(
            "lm-evaluation-harness is not installed: pip install 'coterie[harness]'"
        ) from None
    run_harness(context.args)
