"""A reward function of ours in the form that another library calls, as a file beside its data."""

from __future__ import annotations

from pathlib import Path

OPENRLHF = '''

def reward_func(queries, prompts, labels, **more):
    """OpenRLHF: queries are prompts with answers, labels what the data hold."""
    known = [json.loads(label) for label in labels]
    answers = [query[len(prompt):] for query, prompt in zip(queries, prompts)]
    for token in STOP:
        answers = [answer.split(token)[0] for answer in answers]
    scores = score([k["prompt"] for k in known], answers, [k["row"] for k in known])
    scores = torch.tensor([float(each) for each in scores])
    return {"rewards": scores, "scores": scores, "extra_logs": {}}
'''

VERL = '''

def compute_score(data_source, solution_str, ground_truth, extra_info=None, **more):
    """verl: one answer; ground_truth is what the data hold."""
    known = json.loads(ground_truth)
    (found,) = score([known["prompt"]], [solution_str], [known["row"]])
    return float(found)
'''


def reward_script(config, form: str, stop: tuple[str, ...] = ()) -> str:
    """The text of reward.py: our function or server, behind the library's own call."""
    torch = "import torch\n" if form == OPENRLHF else ""
    return (
        '"""The reward of `rlhf-course ppo --reward`, as another library calls it."""\n\n'
        f"import json\nimport sys\n\n{torch}\n"
        f"sys.path.insert(0, {Path.cwd().as_posix()!r})  # where the function was found\n"
        "from rlhf_course.stages.rewards import load_reward_function\n\n"
        f"score = load_reward_function({config.reward!r}, {config.reward_timeout!r}, "
        f"{config.reward_retries!r})\nSTOP = {stop!r}  # tokens that end an answer\n{form}"
    )
