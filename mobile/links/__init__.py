"""Links copy experts into slots: in real time, or on a clock that is computed."""
