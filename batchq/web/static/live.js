// Keeps the live parts of a page as the server last sent them. An unchanged piece is not replaced, so that focus,
// selection and opened details stay. Where a piece is replaced, focus returns to the element with the same id.
"use strict";

const NEWS_MILLISECONDS = 10000;
const LOST_MILLISECONDS = 4000; // a stream that has reached its end is followed by another one within 2 s
const live = document.querySelector("[data-live]");
const button = document.getElementById("live-switch");
const label = document.getElementById("live-label");
const dot = document.getElementById("live-dot");
const news = document.getElementById("live-news");
let source = null;
let lost = 0;
let announcedAt = 0;

function showState(text, state) {
  label.textContent = text;
  dot.dataset.state = state;
}

// For screen readers, which would otherwise be interrupted by every update.
function announce(piece) {
  const text = piece.dataset.news;
  if (text && text !== news.textContent && Date.now() - announcedAt > NEWS_MILLISECONDS) {
    announcedAt = Date.now();
    news.textContent = text;
  }
}

function replace(now, next) {
  if (now.outerHTML === next.outerHTML) return;
  const opened = [...now.querySelectorAll("details[open]")].map((details) => details.id);
  const scrolled = [...now.querySelectorAll(".scroll[id], pre[id]")].map((box) => [box.id, box.scrollLeft, box.scrollTop]);
  const focused = now.contains(document.activeElement) ? document.activeElement.id : "";
  now.replaceWith(next);
  for (const id of opened) {
    const details = document.getElementById(id);
    if (details) details.open = true;
  }
  for (const [id, left, top] of scrolled) {
    document.getElementById(id)?.scrollTo(left, top);
  }
  if (focused) document.getElementById(focused)?.focus({ preventScroll: true });
  next.dispatchEvent(new CustomEvent("piecereplaced", { bubbles: true, detail: { hadFocus: focused } }));
  announce(next);
}

function show(text) {
  const template = document.createElement("template");
  template.innerHTML = text;
  for (const next of template.content.querySelectorAll("[data-piece]")) {
    const now = document.getElementById(next.id);
    if (now) replace(now, next);
  }
}

function start() {
  showState("Connecting", "");
  source = new EventSource(live.dataset.live);
  source.onopen = () => {
    waitForReconnect(false);
    showState("Live", "on");
  };
  source.onmessage = (event) => show(event.data);
  source.onerror = () => waitForReconnect(true);
}

// Shows that the connection is lost: immediately where the server refuses another one, otherwise if none comes.
function waitForReconnect(isWaiting) {
  if (isWaiting && source.readyState === EventSource.CONNECTING) {
    lost ||= setTimeout(() => showState("Connection lost", "off"), LOST_MILLISECONDS);
    return;
  }
  clearTimeout(lost);
  lost = 0;
  if (isWaiting) showState("Connection lost", "off");
}

function pause() {
  waitForReconnect(false);
  source.close();
  source = null;
  showState("Paused", "");
}

button.hidden = false;
button.addEventListener("click", () => {
  if (source) pause();
  else start();
  button.setAttribute("aria-pressed", String(Boolean(source)));
});
window.addEventListener("pagehide", () => source?.close());
window.addEventListener("pageshow", (event) => event.persisted && button.getAttribute("aria-pressed") === "true" && start());
start();
