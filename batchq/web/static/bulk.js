// Sends the form of a verb for many again and again, a chunk a time, until it is done or somebody stops it. Without this
// script the same form has a button for each chunk. How far it is, is in the form alone: closing the page stops it.
"use strict";

const stopButton = document.getElementById("bulk-stop");
const news = document.getElementById("live-news");
const MOST_TRIES = 5;
const TELL_MILLISECONDS = 5000;
let toldAt = Date.now();
let stopped = false;
let wake = () => {};

const piece = (id) => document.getElementById(id);
const goesOn = () => "goesOn" in piece("bulk-form").dataset;

function rest(milliseconds) {
  return new Promise((resolve) => {
    wake = resolve;
    setTimeout(resolve, milliseconds);
  });
}

function complain(text) {
  piece("bulk-problem").textContent = text;
  piece("bulk-problem").hidden = !text;
}

function tell(text) {
  if (Date.now() - toldAt < TELL_MILLISECONDS && goesOn() && !stopped) return;
  toldAt = Date.now();
  news.textContent = text;
}

function show(answer) {
  const next = (id) => answer.getElementById(id);
  if (!next("bulk-form")) throw new Error(next("main")?.textContent.trim() || "the page could not go on");
  piece("bulk-text").replaceChildren(...next("bulk-text").childNodes);
  if (next("bulk-bar")) {
    piece("bulk-bar").max = next("bulk-bar").max;
    piece("bulk-bar").value = next("bulk-bar").value;
  }
  next("bulk-form").hidden = true;
  piece("bulk-form").replaceWith(next("bulk-form"));
  complain(next("bulk-problem").textContent);
  tell(piece("bulk-text").textContent);
}

async function chunk() {
  const form = piece("bulk-form");
  for (let number = 0; ; number += 1) {
    const sent = await fetch(form.action, { method: "POST", body: new URLSearchParams(new FormData(form)) }).catch(() => null);
    const isPassing = !sent || sent.status >= 500;
    if (isPassing && number + 1 < MOST_TRIES && !stopped) {
      await rest(2 ** number * 500);
      continue;
    }
    if (!sent) throw new Error("the page's server does not answer");
    show(new DOMParser().parseFromString(await sent.text(), "text/html"));
    return sent.ok;
  }
}

async function run() {
  piece("bulk-form").hidden = true;
  stopButton.hidden = false;
  try {
    let isWell = true;
    while (isWell && goesOn() && !stopped) {
      await rest(Number(piece("bulk-form").dataset.restMilliseconds));
      if (!stopped) isWell = await chunk();
    }
  } catch (error) {
    complain(error.message);
  }
  end();
}

function end() {
  const hadFocus = document.activeElement === stopButton;
  stopButton.hidden = true;
  piece("bulk-form").hidden = false;
  if (stopped && goesOn()) {
    piece("bulk-text").prepend("Stopped. ");
    tell(piece("bulk-text").textContent);
  }
  if (hadFocus) piece("bulk-text").focus();
}

stopButton.addEventListener("click", () => {
  stopped = true;
  wake();
});
if (goesOn() && piece("bulk-problem").hidden) run();
