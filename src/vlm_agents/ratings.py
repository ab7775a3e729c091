"""How useful a step was, by what it did to the expert's distance to success. Numbers of one turn; nothing is asked."""

from vlm_agents.types import Turn


def quality(turn: Turn) -> float:
    """0-10 by what the step did to the expert's distance to success: 10 a step nearer, 5 as far, 0 farther or lost.

    Where the expert counts no steps: 10 for doing what it advises, else 0.
    """
    before = turn.observation.advice
    after = None if turn.step.terminated else turn.step.observation.advice
    if turn.step.success:
        return 10.0
    if before is None or before.distance is None:
        return 10.0 if before is not None and before.action == turn.parsed.action else 0.0
    if after is None or after.distance is None:
        return 0.0
    return min(10.0, max(0.0, 5.0 - 5.0 * (after.distance - before.distance)))
