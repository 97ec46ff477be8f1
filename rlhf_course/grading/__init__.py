"""The autograder: a referee that judges, and players that run what students handed in.

A student's code never runs, nor is its text ever parsed, in the process that gives the points. It
lives in a confined process, which is asked for values and for vector-Jacobian products on inputs
that are fresh in every run, and answers with plain numbers. What it prints, patches, breaks or
ends there is its own affair.

    rlhf-course grade submissions/*        many students, reports and a table
    pytest tests --submission FILE         one, with pytest

Read in this order: `wire` (what crosses), `player` and `forkserver` (the other side), `sandbox`
(what it may not do), `children` and `remote` (our side of it), `referee` (points and sentences),
and then the reports and exports.
"""
