"""Agents for tests, by import path (`agent.factory`)."""

from rome.agent import Agent, NewRow


class Forgetful(Agent):
  """Forgets all turns but the newest where its context would pass `budget` tokens."""

  budget = 170

  def begin(self):
    self._prompt, self._turns = super().begin(), []
    return list(self._prompt)

  def act(self, reply):
    ids = super().act(reply)
    if ids is None:
      return None
    self._turns.append([*reply, *ids])
    if len(self._prompt) + sum(map(len, self._turns)) <= self.budget:
      return ids
    self._turns = self._turns[-1:]
    return NewRow([*self._prompt, *self._turns[0]])
