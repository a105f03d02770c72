"""Ray and Redis: sessions, servers, what an actor reserves."""
