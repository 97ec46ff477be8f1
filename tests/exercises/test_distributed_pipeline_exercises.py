"""Chapter 9's exercise: rollout, training and weight sync, in step or some steps apart."""

import torch
from drivers_distributed_pipeline import piped

from rlhf_course.coursework.expect import equal, exercise

# What an event is about: (start, step, version of the weights), (finish, handle), (train, step,
# answers, the other steps that are pending), (sync, version).


def words(events):
    """The events as sentences: "start 1 with weights 0", "sync 2"."""
    verbs = {"start": "start {1} with weights {2}", "train": "train {1} on {2}"}
    return [verbs.get(event[0], "{0} {1}").format(*event) for event in events]


def rollout(step, version):
    """The handle of a rollout."""
    return f"rollout {step} of weights {version}"


def expected_train(step, version, pending=()):
    return "train", step, f"answers of {rollout(step, version)}", list(pending)


def synchronous(first, last):
    """Every event of a run without staleness: their order leaves no choice."""
    events = []
    for step in range(first, last + 1):
        events += [("start", step, step), ("finish", rollout(step, step))]
        events += [expected_train(step, step), ("sync", step + 1)]
    return events


def trained(events):
    """The training events, and the number of rollouts that had been started before each."""
    starts, found = 0, []
    for event in events:
        starts += event[0] == "start"
        if event[0] == "train":
            found.append((*event, starts))
    return found


def started(events):
    return [event for event in events if event[0] == "start"]


def about(first, last, staleness):
    return {"steps": f"{first} … {last}", "last": last, "staleness": staleness}


@exercise("distributed.pipeline.pipeline_step", core=True)
def test_one_step(subject):
    """one step: start, finish, train, then sync under the number of the next"""
    out = subject.drive(piped, 0, 0, 0)
    equal(words(out["events"]), words(synchronous(0, 0)), "other events", about(0, 0, 0))
    equal(out["results"], [{"step": 0, "loss": 1.0}], "what train gives is returned")


@exercise("distributed.pipeline.pipeline_step", core=True)
def test_in_step(subject):
    """staleness 0: answers are always of the newest weights"""
    out = subject.drive(piped, 0, 2, 2, 0)
    equal(words(out["events"]), words(synchronous(0, 2)), "other events", about(0, 2, 0))
    out = subject.drive(piped, 5, 6, 9)
    equal(words(out["events"]), words(synchronous(5, 6)), "other events", about(5, 6, "not given"))


@exercise("distributed.pipeline.pipeline_step")
def test_one_step_ahead(subject):
    """staleness 1: while a step is trained on, the next one's rollout is running"""
    out = subject.drive(piped, 0, 3, 3, 1)
    wanted = [
        (*expected_train(0, 0, [1]), 2), (*expected_train(1, 0, [2]), 3),
        (*expected_train(2, 1, [3]), 4), (*expected_train(3, 2), 4),
    ]  # fmt: skip
    what = "other (train, step, answers, pending, rollouts started until then)"
    equal(trained(out["events"]), wanted, what, about(0, 3, 1))


@exercise("distributed.pipeline.pipeline_step")
def test_two_steps_ahead(subject):
    """staleness 2: the rollouts of the next two steps are running"""
    out = subject.drive(piped, 0, 4, 9, 2)
    versions = [0, 0, 0, 1, 2]
    wanted = [
        (*expected_train(step, version, [step + 1, step + 2]), step + 3)
        for step, version in enumerate(versions)
    ]
    what = "other (train, step, answers, pending, rollouts started until then)"
    equal(trained(out["events"]), wanted, what, {**about(0, 4, 2), "last": 9})


@exercise("distributed.pipeline.pipeline_step")
def test_which_weights(subject):
    """each rollout is started once, with the weights that the engines hold then"""
    for staleness in (1, 2, 3):
        out = subject.drive(piped, 0, 6, 6, staleness)
        wanted = [("start", step, max(step - staleness, 0)) for step in range(7)]
        equal(
            words(started(out["events"])), words(wanted), "other rollouts", about(0, 6, staleness)
        )


@exercise("distributed.pipeline.pipeline_step")
def test_nothing_beyond_the_last_step(subject):
    """nothing is started beyond the last step, and nothing is left pending behind it"""
    for staleness in (0, 1, 2, 5):
        out = subject.drive(piped, 0, 2, 2, staleness)
        steps = [event[1] for event in started(out["events"])]
        equal(steps, [0, 1, 2], "other rollouts were started", about(0, 2, staleness))
        equal(out["pending"], [], "still pending at the end", about(0, 2, staleness))


@exercise("distributed.pipeline.pipeline_step")
def test_pending_is_bounded(subject):
    """what has been trained on is pending no more, so there are never more than staleness"""
    for staleness in (0, 1, 3):
        out = subject.drive(piped, 0, 5, 50, staleness)
        wanted = list(range(6, 6 + staleness))
        equal(out["pending"], wanted, "other steps are pending", about(0, 5, staleness))


@exercise("distributed.pipeline.pipeline_step")
def test_every_step_is_synced(subject):
    """training is followed by the sync, under the number of updates that made the weights"""
    for staleness in (0, 1, 2):
        out = subject.drive(piped, 3, 6, 6, staleness)
        order = [f"{e[0]} {e[1]}" for e in out["events"] if e[0] in ("train", "sync")]
        wanted = [told for step in range(3, 7) for told in (f"train {step}", f"sync {step + 1}")]
        equal(order, wanted, "another order", about(3, 6, staleness))


@exercise("distributed.pipeline.pipeline_step")
def test_only_its_own_answers_are_waited_for(subject):
    """a step waits for its own rollout, and not for those beside it"""
    out = subject.drive(piped, 0, 3, 9, 2)
    handles = [event[1] for event in out["events"] if event[0] == "finish"]
    wanted = [rollout(step, max(step - 2, 0)) for step in range(4)]
    equal(handles, wanted, "others were waited for", about(0, 3, 2))


@exercise("distributed.pipeline.pipeline_step")
def test_what_is_pending_already(subject):
    """a rollout that was started in an earlier call is not started again"""
    out = subject.drive(piped, 4, 4, 9, 2, [4, 5])
    inputs = {**about(4, 4, 2), "last": 9, "pending": [4, 5]}
    equal(
        words(started(out["events"])),
        ["start 6 with weights 4"],
        "other rollouts were started",
        inputs,
    )
    wanted = [(*expected_train(4, 3, [5, 6]), 1)]
    equal(trained(out["events"]), wanted, "trained on other answers", inputs)


@exercise("distributed.pipeline.pipeline_step")
def test_what_is_returned(subject):
    """what training gives is returned"""
    for staleness in (0, 1):
        out = subject.drive(piped, 2, 4, 4, staleness)
        wanted = [{"step": step, "loss": 1 / (1 + step)} for step in (2, 3, 4)]
        equal(out["results"], wanted, "another result", about(2, 4, staleness))


@exercise("distributed.pipeline.pipeline_step")
def test_any_run(subject, rng):
    """a run from any step to any other, with any staleness"""
    for _ in range(6):
        first, length, staleness = (
            torch.randint(n, (1,), generator=rng).item() for n in (20, 9, 5)
        )
        last = first + length
        out = subject.drive(piped, first, last, last, staleness)
        wanted = [
            (
                *expected_train(
                    step, max(step - staleness, first),
                    range(step + 1, min(step + staleness, last) + 1),
                ),
                min(step + staleness, last) + 1 - first,
            )
            for step in range(first, last + 1)
        ]  # fmt: skip
        what = "other (train, step, answers, pending, rollouts started until then)"
        equal(trained(out["events"]), wanted, what, about(first, last, staleness))
        synced = [event[1] for event in out["events"] if event[0] == "sync"]
        equal(synced, list(range(first + 1, last + 2)), "other weights were sent")


@exercise("distributed.pipeline.pipeline_step")
def test_training_that_fails(subject):
    """when training fails the error goes on, and no weights are sent"""
    out = subject.drive(piped, 0, 2, 2, 0, [], 1)
    equal(out["results"][-1], "ArithmeticError: NaN", "another result", about(0, 2, 0))
    synced = words(event for event in out["events"] if event[0] == "sync")
    equal(synced, ["sync 1"], "weights were sent", about(0, 2, 0))
