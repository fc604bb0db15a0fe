"""Views: a worker and its requests, as admission gates and balancers see them."""

from services.scheduler.core.books import Books
from services.scheduler.core.policies.members import Member, View
from services.scheduler.core.state import Request, State
from services.scheduler.core.workers import Worker


def view(books: Books, worker: Worker, reserve: int = 0) -> View:
    """All that run there. `reserve`: tokens that stay free."""
    running = [r for r in worker.credit.leases.values() if r.state is State.PLACED]
    return View(
        capacity_tokens=worker.memory.kv_tokens_capacity - reserve,
        block_tokens=worker.credit.block_tokens,
        members=[member(books, request, request.until) for request in running],
        lengths=books.lengths,
        constants=books.constants,
        draws=books.draws,
        margin_z=books.margin.z,
    )


def member(books: Books, request: Request, made: int) -> Member:
    """With `made` tokens, those that its lease covers among them."""
    return Member(
        prompt_tokens=request.prompt_tokens,
        made=made,
        cap=request.spec.max_tokens,
        true_output=books.truth(request.request_id) if books.truth else 0,
        leased=made - request.output_tokens,
        predicted=request.predicted_tokens,
        returning=request.evicted_at > 0 or request.rested > 0,
    )
