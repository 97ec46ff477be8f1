"""Wrong answers to chapter 9's pipeline, each with the sentence that names its mistake."""

from rlhf_course.coursework.mutants import Mutant

ID = "distributed.pipeline.pipeline_step"
RANGE = "range(step, min(step + staleness, last) + 1)"


def mutant(name, says, *edits):
    return Mutant(ID, name, says, edits)


MUTANTS = [
    mutant(
        "staleness ignored",
        "You never start a rollout ahead, so the engines stand still while the trainer works.",
        (RANGE, "range(step, step + 1)"),
    ),
    mutant(
        "always one ahead",
        "You are always one step ahead. How far is said by `staleness`: 0 is not at all.",
        (RANGE, "range(step, min(step + 1, last) + 1)"),
    ),
    mutant(
        "one too far ahead",
        "You start one step more than `staleness` allows, also where it is 0.",
        (RANGE, "range(step, min(step + staleness + 1, last) + 1)"),
    ),
    mutant(
        "one too few",
        "You start one step less: `range` ends before its second number. With staleness 0 that is "
        "none at all.",
        (RANGE, "range(step, min(step + staleness, last))"),
    ),
    mutant(
        "beyond the last step",
        "You start rollouts beyond the last step, which nobody will train on.",
        (RANGE, "range(step, step + staleness + 1)"),
    ),
    mutant(
        "the last step is never started",
        "`last` is a step, too: its rollout has to be started.",
        (RANGE, "range(step, max(min(step + staleness, last - 1), step) + 1)"),
        ("pending.pop(step)", "pending.pop(step) if step < last or not staleness else start(step)"),
    ),
    mutant(
        "started again and again",
        "You start rollouts that are pending already: each would be computed several times.",
        (
            "        if ahead not in pending:\n            pending[ahead] = start(ahead)",
            "        pending[ahead] = start(ahead)",
        ),
    ),
    mutant(
        "only the farthest is started",
        "You start only the step that is `staleness` ahead. In the first call those before it are "
        "missing as well.",
        (RANGE, "{step, min(step + staleness, last)}"),
    ),
    mutant(
        "started after training",
        "You start the next rollouts when training is over. They are to run beside it: start them "
        "before.",
        (
            "    for ahead in range(step, min(step + staleness, last) + 1):\n"
            "        if ahead not in pending:\n"
            "            pending[ahead] = start(ahead)\n"
            "    answers = finish(pending.pop(step))\n"
            "    result = train(step, answers)\n",
            "    if step not in pending:\n"
            "        pending[step] = start(step)\n"
            "    answers = finish(pending.pop(step))\n"
            "    result = train(step, answers)\n"
            "    for ahead in range(step, min(step + staleness, last) + 1):\n"
            "        if ahead > step and ahead not in pending:\n"
            "            pending[ahead] = start(ahead)\n",
        ),
    ),
    mutant(
        "started after the sync",
        "You start the next rollouts after the sync. They are never stale then, but nothing runs "
        "beside the training.",
        (
            "    for ahead in range(step, min(step + staleness, last) + 1):\n"
            "        if ahead not in pending:\n"
            "            pending[ahead] = start(ahead)\n",
            "    if step not in pending:\n        pending[step] = start(step)\n",
        ),
        (
            "    sync(step + 1)\n",
            "    sync(step + 1)\n"
            "    for ahead in range(step + 1, min(step + staleness, last) + 1):\n"
            "        if ahead not in pending:\n"
            "            pending[ahead] = start(ahead)\n",
        ),
    ),
    mutant(
        "the newest is trained on",
        "You train on the rollout that was started last. The step's own has been waiting longer.",
        ("pending.pop(step)", "pending.pop(max(pending))"),
    ),
    mutant(
        "never taken out",
        "You leave what has been trained on in `pending`. It grows from call to call.",
        ("pending.pop(step)", "pending[step]"),
    ),
    mutant(
        "waits for all",
        "You wait for all pending rollouts. Only the step's own is needed, the others go on beside "
        "the training.",
        (
            "answers = finish(pending.pop(step))",
            "answers = [finish(pending[k]) for k in sorted(pending)][0]\n    del pending[step]",
        ),
    ),
    mutant(
        "sync before training",
        "You send the weights before they are trained, so the engines are always an update behind.",
        (
            "    result = train(step, answers)\n    sync(step + 1)\n",
            "    sync(step + 1)\n    result = train(step, answers)\n",
        ),
    ),
    mutant(
        "sync missing",
        "You never send the new weights. The engines would answer with the first ones for ever.",
        ("    sync(step + 1)\n", ""),
    ),
    mutant(
        "number of the step",
        "You call the new weights `step`. The engines hold those already: now there have been "
        "step + 1 updates.",
        ("sync(step + 1)", "sync(step)"),
    ),
    mutant(
        "synced whatever happens",
        "You send the weights even where training has failed. The engines would get NaN.",
        (
            "    result = train(step, answers)\n    sync(step + 1)\n",
            "    try:\n        result = train(step, answers)\n"
            "    finally:\n        sync(step + 1)\n",
        ),
    ),
    mutant(
        "synced at the end only",
        "You sync only where nothing is pending. Running rollouts finish with the weights they "
        "have; the next ones need the new weights.",
        ("    sync(step + 1)\n", "    if not pending:\n        sync(step + 1)\n"),
    ),
    mutant(
        "handle instead of answers",
        "You train on the handle. `finish` gives the answers.",
        ("train(step, answers)", "train(step, pending.get(step, str(answers)[11:]))"),
    ),
    mutant(
        "answers returned",
        "You return the answers. What `train` gives is asked for.",
        ("return result", "return answers"),
    ),
    mutant(
        "nothing returned",
        "You return nothing. What `train` gives is asked for.",
        ("return result", "return None"),
    ),
    mutant(
        "trained as the next step",
        "You tell the trainer the number of the next step.",
        ("train(step, answers)", "train(step + 1, answers)"),
    ),
]
