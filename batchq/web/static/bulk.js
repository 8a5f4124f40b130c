// Sends the form of an action on all matching batches, once per chunk, until all are done or somebody stops it. Without
// this script, the form has a button that does one chunk. Only the form holds the progress: closing the page stops it.
"use strict";

const stopButton = document.getElementById("bulk-stop");
const news = document.getElementById("live-news");
const MOST_ATTEMPTS = 5;
const NEWS_MILLISECONDS = 5000;
let announcedAt = Date.now();
let stopped = false;
let wake = () => {};

const piece = (id) => document.getElementById(id);
const continues = () => "goesOn" in piece("bulk-form").dataset;

function rest(milliseconds) {
  return new Promise((resolve) => {
    wake = resolve;
    setTimeout(resolve, milliseconds);
  });
}

function showProblem(text) {
  piece("bulk-problem").textContent = text;
  piece("bulk-problem").hidden = !text;
}

function announce(text) {
  if (Date.now() - announcedAt < NEWS_MILLISECONDS && continues() && !stopped) return;
  announcedAt = Date.now();
  news.textContent = text;
}

function show(answer) {
  const next = (id) => answer.getElementById(id);
  if (!next("bulk-form")) throw new Error(next("main")?.textContent.trim() || "The server sent an unexpected page.");
  piece("bulk-text").replaceChildren(...next("bulk-text").childNodes);
  if (next("bulk-bar")) {
    piece("bulk-bar").max = next("bulk-bar").max;
    piece("bulk-bar").value = next("bulk-bar").value;
  }
  next("bulk-form").hidden = true;
  piece("bulk-form").replaceWith(next("bulk-form"));
  showProblem(next("bulk-problem").textContent);
  announce(piece("bulk-text").textContent);
}

async function sendChunk() {
  const form = piece("bulk-form");
  for (let number = 0; ; number += 1) {
    const sent = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) }).catch(() => null);
    const isTemporary = !sent || sent.status >= 500;
    if (isTemporary && number + 1 < MOST_ATTEMPTS && !stopped) {
      await rest(2 ** number * 500);
      continue;
    }
    if (!sent) throw new Error("The server does not answer.");
    show(new DOMParser().parseFromString(await sent.text(), "text/html"));
    return sent.ok;
  }
}

async function run() {
  piece("bulk-form").hidden = true;
  stopButton.hidden = false;
  try {
    let isSent = true;
    while (isSent && continues() && !stopped) {
      await rest(Number(piece("bulk-form").dataset.restMilliseconds));
      if (!stopped) isSent = await sendChunk();
    }
  } catch (error) {
    showProblem(error.message);
  }
  finish();
}

function finish() {
  const hadFocus = document.activeElement === stopButton;
  stopButton.hidden = true;
  piece("bulk-form").hidden = false;
  if (stopped && continues()) {
    piece("bulk-text").prepend("Stopped. ");
    announce(piece("bulk-text").textContent);
  }
  if (hadFocus) piece("bulk-text").focus();
}

stopButton.addEventListener("click", () => {
  stopped = true;
  wake();
});
if (continues() && piece("bulk-problem").hidden) run();
