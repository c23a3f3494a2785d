"""A reward of a user's own, for the tests: it differs between rollouts from the first step on."""


class Variety:
    def score(self, rollout):
        return len(set(rollout.completion_ids)) % 5 / 4
