// Keys for people who keep the page open: "/" searches, "g" and a letter goes to a page, "?" lists them all. They do
// nothing while somebody types, and can be switched off (WCAG 2.1.4). Without this script every page works the same.
"use strict";

const GO_MILLISECONDS = 1500;
const SWITCH = "batchq keys";
const keysDialog = document.getElementById("keys");
const keysButton = document.getElementById("keys-open");
const keysSwitch = document.getElementById("keys-on");
const pages = new Map([...document.querySelectorAll("#keys-list a[data-key]")].map((link) => [link.dataset.key, link]));
let wentAt = 0;

function areOn() {
  try {
    return localStorage.getItem(SWITCH) !== "off";
  } catch {
    return true; // a browser that stores nothing
  }
}

function keepSwitch() {
  try {
    localStorage.setItem(SWITCH, keysSwitch.checked ? "on" : "off");
  } catch {
    // it holds for this page
  }
}

function isTyping(element) {
  return element.matches("textarea, select, input:not([type=checkbox]):not([type=radio])") || element.isContentEditable;
}

function showKeys() {
  keysSwitch.checked = areOn();
  keysDialog.showModal();
}

const single = {
  "/": () => (document.querySelector("[data-search]") || document.getElementById("find-id")).focus(),
  "?": showKeys,
  p: () => document.getElementById("live-switch")?.click(),
  g: () => (wentAt = performance.now()),
};

document.addEventListener("keydown", (event) => {
  if (event.ctrlKey || event.metaKey || event.altKey || isTyping(event.target) || keysDialog.open || !areOn()) return;
  const goes = performance.now() - wentAt < GO_MILLISECONDS && pages.get(event.key);
  wentAt = 0;
  if (!goes && !single[event.key]) return;
  event.preventDefault();
  if (goes) goes.click();
  else single[event.key]();
});

keysButton.hidden = false;
keysButton.addEventListener("click", showKeys);
keysSwitch.addEventListener("change", keepSwitch);
