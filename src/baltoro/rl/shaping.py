"""From the iteration to the weights of the named signals, whose sum is the reward."""

from dataclasses import dataclass


@dataclass(frozen=True)
class ParlShaping:
    """r_PARL = lambda1 * parallel + lambda2 * finish + perf (section 3); both lambdas fall linearly to 0 over
    `anneal` of the iterations. The report does not give their values or the form of the annealing."""

    lambda_parallel: float
    lambda_finish: float
    anneal: float = 0.8

    def lambdas(self, iteration: int, iterations: int) -> tuple[float, float]:
        left = max(0.0, 1.0 - iteration / (self.anneal * iterations))
        return self.lambda_parallel * left, self.lambda_finish * left

    def weights(self, iteration: int, iterations: int) -> dict[str, float]:
        first, second = self.lambdas(iteration, iterations)
        return {"parallel": first, "finish": second, "perf": 1.0}
