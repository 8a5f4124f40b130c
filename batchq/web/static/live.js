// Keeps the live parts of a page as the server last sent them. A piece that has not changed is left alone, so that
// focus, selection and opened details stay; where one is replaced, focus returns to the element of the same id.
"use strict";

const live = document.querySelector("[data-live]");
const button = document.getElementById("live-switch");
const label = document.getElementById("live-label");
const dot = document.getElementById("live-dot");
const news = document.getElementById("live-news");
let source = null;
let toldAt = 0;

function say(text, state) {
  label.textContent = text;
  dot.dataset.state = state;
}

function tell(piece) {
  const text = piece.dataset.news;
  if (text && text !== news.textContent && Date.now() - toldAt > 10000) {
    toldAt = Date.now();
    news.textContent = text;
  }
}

function put(now, next) {
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
  tell(next);
}

function show(text) {
  const template = document.createElement("template");
  template.innerHTML = text;
  for (const next of template.content.querySelectorAll("[data-piece]")) {
    const now = document.getElementById(next.id);
    if (now) put(now, next);
  }
}

function start() {
  say("Connecting", "");
  source = new EventSource(live.dataset.live);
  source.onopen = () => say("Live", "on");
  source.onmessage = (event) => show(event.data);
  source.onerror = () => say("Connection lost", "off");
}

function stop(text) {
  source?.close();
  source = null;
  say(text, "");
}

button.hidden = false;
button.addEventListener("click", () => {
  if (source) stop("Paused");
  else start();
  button.setAttribute("aria-pressed", String(Boolean(source)));
});
window.addEventListener("pagehide", () => source?.close());
window.addEventListener("pageshow", (event) => event.persisted && button.getAttribute("aria-pressed") === "true" && start());
start();
