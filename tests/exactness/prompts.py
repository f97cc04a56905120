"""One memory and twelve questions about it: the prompts that every exactness run sends."""

from __future__ import annotations

from typing import Any

from memos_vllm.activation.prefix import compose_messages, render_memory_block
from memos_vllm.domain.cube import SnapshotMemory
from memos_vllm.domain.ids import MemoryId

SYSTEM_TEXT = "Answer in plain words."

NOTES = (
    "Larkspur Ferries runs three boats between Oskarsund and the outer islands. The Heron carries "
    "cars, the Tern and the Plover carry only passengers and bicycles.",
    "The Heron leaves Oskarsund at 6:40, 10:15 and 17:30. On Sundays the first sailing is at 9:05. "
    "The crossing to Velm takes fifty minutes in calm weather.",
    "A return ticket for one adult costs 18 crowns. Children under seven travel free, and older "
    "children pay half. A car with its driver costs 64 crowns each way.",
    "Tickets can be returned up to two hours before sailing. The refund reaches the traveller's "
    "account within five working days, less a fee of 2 crowns.",
    "Dogs may travel on the open deck of every boat, on a lead. Cats and birds must stay in a "
    "closed basket. No animal may enter the dining room of the Heron.",
    "When the wind is above 17 metres a second, the Plover stays in harbour. Above 22 metres a "
    "second all sailings stop, and tickets stay valid for thirty days.",
    "Lost property is kept for ninety days in the office at Pier 4. The office is open from 8:00 "
    "to 15:30 on weekdays and is led by Maren Holt.",
    "Each passenger may bring two bags of at most 20 kilograms. Bicycles need a place ticket of 5 "
    "crowns, and electric scooters are not taken at all.",
    "The dining room of the Heron serves fish soup, rye bread and coffee. The kitchen closes ten "
    "minutes before arrival. Own food may be eaten on deck.",
    "Captain Ilse Brandt has commanded the Heron since 2011. Her first mate is Tomas Rui, who "
    "also trains new crew each spring in the harbour of Velm.",
    "The Tern was built in 1998 at the yard in Norrby and got new engines in 2019. She carries "
    "140 passengers at a speed of 21 knots.",
    "School classes travel at half price on weekdays outside July. A class must register a week "
    "ahead by writing to groups at the harbour office.",
    "Wheelchair users board first. The Heron and the Tern have lifts, the Plover has only a ramp, "
    "which cannot be used at very low tide.",
    "In winter, from November to March, the Plover is laid up for repair, and the Tern sails to "
    "Velm only on Tuesdays, Thursdays and Saturdays.",
    "The island of Velm has one shop, one inn with nine rooms and a lighthouse that visitors may "
    "climb on Saturdays. The inn is called the Blue Anchor.",
    "Crew members wear a green jacket. Complaints go to the purser on board, or in writing to the "
    "harbour office, which answers within ten days.",
    "The timetable changes on the first Monday of April and of October. Printed copies hang at "
    "every pier, and the ticket office in Oskarsund hands them out for nothing.",
)

QUESTIONS = (
    "When does the Heron leave Oskarsund in the morning?",
    "How much does a return ticket cost for two adults?",
    "May I take my dog with me, and where must it stay?",
    "What happens to my ticket when a storm stops all sailings?",
    "Where can I look for an umbrella that I lost on board?",
    "Which boat can carry my car to Velm?",
    "Write two sentences about Captain Ilse Brandt.",
    "I use a wheelchair. Which boat should I avoid at low tide?",
    "List what the kitchen of the Heron serves.",
    "Our school class wants to visit in July. What would we pay?",
    "Tell me something about the island of Velm.",
    "How long does a refund take to arrive?",
)


def memory_block() -> str:
    """The notes as the renderer opens a prompt with them."""
    notes = [
        SnapshotMemory(id=MemoryId(f"note-{number}"), version=1, text=text)
        for number, text in enumerate(NOTES)
    ]
    return render_memory_block(None, notes)


def question_messages(question: str) -> list[dict[str, Any]]:
    """A chat without memory, as a caller sends it together with a memcube_id."""
    return [
        {"role": "system", "content": SYSTEM_TEXT},
        {"role": "user", "content": question},
    ]


def composed_messages(question: str) -> list[dict[str, Any]]:
    """The same chat with the memory put into the system turn by hand, for plain vLLM."""
    return compose_messages(question_messages(question), block=memory_block())
