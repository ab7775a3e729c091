"""The card games of RL4VLM, written anew: NumberLine, Blackjack, EZPoints and Points24.

State, actions, rewards, the chances of every deal, and limits are the original's. What was a bug there is none here:

- The seed decides everything; the original draws most of its cards from a generator that nothing seeds.
- Formulas are exact: 8/(3-8/3) is 24. Two digits in a row are no number, and `**` and `//` no operators.
- A long formula goes on in the next line, and a blank in it shows as `_`; there it leaves the picture, unseen.
- All cards of a Blackjack hand can be seen, however many there are, and the dealer's too once the hand is over.
- A Blackjack hand's tens may be tens, not J, Q, K alone; `natural` works; no info tells the dealer's hidden card.
- An info's `formula` is a copy, which later steps leave alone; `observation=text` works.
- Success is what the game calls it, not a return above zero. Font and cards come with the package.

A turn without a legal action passes and nothing is done, but it counts: an episode always ends. `compat="rl4vlm"`
brings the original's ways back, to compare with its published numbers: floats and Python's reading of formulas, cards
and symbols beyond the picture's edge, a random action where none could be read, success as a return above zero. (It
needs `invalid_penalty=0`, and `prompt=rl4vlm` belongs to it.) One bug can't be had: there an episode's first prompt
shows the last one's formula, so that its seed doesn't decide the episode.
"""

__all__ = ["CardEnv"]

from vlm_agents.envs.gym_cards.words import CardEnv
