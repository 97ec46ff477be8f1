"""Chapter 9's driver: rollouts, trainer and weights of which only the events are real."""


class Run:
    """What `pipeline_step` steers, written down in `events`."""

    def __init__(self, version, train_fails_at=None):
        self.version, self.train_fails_at = version, train_fails_at
        self.events, self.pending = [], {}

    def start(self, step):
        self.events.append(("start", step, self.version))
        return f"rollout {step} of weights {self.version}"

    def finish(self, handle):
        self.events.append(("finish", handle))
        return f"answers of {handle}"

    def train(self, step, answers):
        behind = sorted(other for other in self.pending if other != step)
        self.events.append(("train", step, answers, behind))
        if step == self.train_fails_at:
            raise ArithmeticError("NaN")
        return {"step": step, "loss": 1 / (1 + step)}

    def sync(self, version):
        self.events.append(("sync", version))
        self.version = version


def piped(namespace, first, until, last, staleness=None, before=(), fails_at=None):
    """Steps first, …, until of a run whose last is `last`: what each returned, the events, and what
    is still pending at the end.

    before: steps whose rollouts were started already. fails_at: where training fails.
    """
    run, results = Run(first, fails_at), []
    for step in before:
        run.pending[step] = f"rollout {step} of weights {first - 1}"
    extra = () if staleness is None else (staleness,)
    try:
        for step in range(first, until + 1):
            results.append(
                namespace.pipeline_step(
                    step, last, run.pending, run.start, run.finish, run.train, run.sync, *extra
                )
            )
    except ArithmeticError as error:
        results.append(f"{type(error).__name__}: {error}")
    return {"results": results, "events": run.events, "pending": sorted(run.pending)}
