"""`ratchet`: the command line. It talks HTTP like any client; `ratchet up` supervises the embedded stack."""
