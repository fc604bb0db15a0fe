"""Foretelling: new requests about which the estimator's predictor is asked, and its answers.

Nobody waits for an answer: until one comes, and if none does, a request is expected to be as its
class in the history. An answer may come while the request waits or runs; from then on its class is
that of the prediction.
"""

from services.scheduler.core.books import Books
from services.scheduler.core.predict import predict_output
from services.scheduler.core.state import Request, State
from shared.messages import LengthPredicted, PredictionWanted

ASKED_MAX = 256
"""Questions without an answer: with more the predictor is behind, and more questions would make it
later. They are forgotten with the next forecast, some seconds later."""


def ask(books: Books, request: Request) -> None:
    """If there is a predictor, and nobody has said how long the output will be."""
    forecast, spec = books.forecast, request.spec
    if forecast is None or not forecast.predicts or request.predicted_tokens:
        return
    if len(books.asked) >= ASKED_MAX:
        return
    books.asked[spec.request_id] = None
    books.send(
        PredictionWanted(
            epoch=books.epoch,
            request_id=spec.request_id,
            model=spec.model,
            endpoint=spec.endpoint,
            tenant=spec.tenant,
            prompt=spec.prompt,
            max_tokens=spec.max_tokens,
        )
    )


def predicted(books: Books, event: LengthPredicted, now: float) -> None:
    """The answer; late, repeated and absurd ones change nothing."""
    books.asked.pop(event.request_id, None)
    request = books.requests.open.get(event.request_id)
    if request is None or request.predicted_tokens or event.output_tokens < 1:
        return
    request.predicted_tokens = min(event.output_tokens, request.spec.max_tokens)
    predict_output(books, request)
    waits = request.state is State.WAITING and not request.paused
    if books.leased and waits and request.request_id not in books.lines.bound:
        books.lines.central.push(request, now)  # it is ranked anew
