// Keeps one stream to the server open, and opens it again with growing pauses. There is no polling.

import { ask, eventsOf } from "./api.js";

const FIRST_PAUSE_MS = 1000;
const LONGEST_PAUSE_MS = 15000;
// The server sends a comment every 15 s, so a longer silence means that the connection is dead.
const SILENCE_MS = 40000;
// A tab that nobody sees gives its place at the server back after this time.
const HIDDEN_MS = 60000;
// Errors with one of these codes do not change by themselves. All others may: a proxy has no route to the console while
// the router restarts.
const FINAL = new Set(["console_off", "admin_only"]);

// A 401 asks for another key, so it is for a person to answer.
function isFinal(error) {
  return error.status === 401 || FINAL.has(error.code);
}

export class Live {
  // `onState(state)`, `onDelta(delta)`, `onLink({isUp, since, error})` and `onRefused(error)` are called.
  constructor(handlers) {
    this.handlers = handlers;
    this.run = 0;
    this.hidden = null;
    this.onVisibility = () => this.visibilityChanged();
  }

  start() {
    this.isPaused = false;
    document.addEventListener("visibilitychange", this.onVisibility);
    this.loop(++this.run);
  }

  stop() {
    document.removeEventListener("visibilitychange", this.onVisibility);
    this.pause();
  }

  pause() {
    this.run += 1;
    clearTimeout(this.hidden);
    clearTimeout(this.silence);
    this.controller?.abort();
    this.wake?.();
  }

  visibilityChanged() {
    clearTimeout(this.hidden);
    if (document.hidden) {
      this.hidden = setTimeout(() => {
        this.pause();
        this.isPaused = true;
      }, HIDDEN_MS);
    } else if (this.isPaused) {
      this.isPaused = false;
      this.loop(++this.run);
    } else {
      this.wake?.();
    }
  }

  async loop(run) {
    let pause = FIRST_PAUSE_MS;
    let since = null;
    while (run === this.run) {
      let error = null;
      try {
        await this.read(() => {
          pause = FIRST_PAUSE_MS;
          since = null;
        });
      } catch (caught) {
        error = caught;
      }
      if (run !== this.run) return;
      if (error !== null && isFinal(error)) {
        this.handlers.onRefused(error);
        return;
      }
      since ??= Date.now();
      this.handlers.onLink({ isUp: false, since, error });
      await this.sleep(Math.max(pause, 1000 * (error?.retryAfterS || 0)));
      pause = Math.min(2 * pause, LONGEST_PAUSE_MS);
    }
  }

  async read(onOpen) {
    const controller = new AbortController();
    this.controller = controller;
    const listen = () => {
      clearTimeout(this.silence);
      this.silence = setTimeout(() => controller.abort(), SILENCE_MS);
    };
    listen();
    try {
      const response = await ask("api/stream", { signal: controller.signal });
      for await (const { event, data } of eventsOf(response, listen)) {
        if (controller.signal.aborted) return;
        if (event === "state") {
          onOpen();
          this.handlers.onState(JSON.parse(data));
          this.handlers.onLink({ isUp: true, since: null, error: null });
        } else if (event === "delta") {
          this.handlers.onDelta(JSON.parse(data));
        }
      }
    } finally {
      clearTimeout(this.silence);
      controller.abort();
    }
  }

  sleep(milliseconds) {
    return new Promise((resolve) => {
      const timer = setTimeout(resolve, milliseconds);
      this.wake = () => {
        clearTimeout(timer);
        resolve();
      };
    });
  }
}
