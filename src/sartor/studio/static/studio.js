/* What pages do beside their links and forms. Each of them works without it. */
"use strict";

/* The server sends the changing part of a page as HTML; it escapes what it shows. */
function follow(element) {
  const source = new EventSource(element.dataset.events);
  source.onmessage = (event) => {
    const log = element.querySelector(".log");
    const isAtEnd = !log || log.scrollTop + log.clientHeight >= log.scrollHeight - 8;
    const place = log ? log.scrollTop : 0;
    element.innerHTML = event.data;
    const renewed = element.querySelector(".log");
    if (renewed) renewed.scrollTop = isAtEnd ? renewed.scrollHeight : place;
  };
  source.addEventListener("end", () => {
    source.close();
    window.location.reload();
  });
}

document.addEventListener("DOMContentLoaded", () => {
  document.querySelectorAll("[data-events]").forEach(follow);
  document.querySelectorAll(".log").forEach((log) => { log.scrollTop = log.scrollHeight; });
});

/* A key goes to the field or presses the button that names it; Ctrl+Enter sends a question. */
document.addEventListener("keydown", (event) => {
  const isTyping = event.target.closest("input, textarea, select");
  if (!isTyping && !event.ctrlKey && !event.metaKey && !event.altKey && /^[a-z/]$/.test(event.key)) {
    const named = document.querySelector(`[data-key="${event.key}"]`);
    if (named) {
      event.preventDefault();
      if (named.matches("input, textarea")) named.focus(); else named.click();
    }
  }
  if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && event.target.matches("[data-send]")) {
    event.preventDefault();
    event.target.form.requestSubmit(document.getElementById(event.target.dataset.send));
  }
});

/* A file that is dropped on the form is chosen by it. */
document.addEventListener("dragover", (event) => {
  if (event.target.closest(".drop")) event.preventDefault();
});
document.addEventListener("drop", (event) => {
  const form = event.target.closest(".drop");
  const field = form && form.querySelector("input[type=file]");
  if (field && event.dataTransfer.files.length) {
    event.preventDefault();
    field.files = event.dataTransfer.files;
  }
});

/* A file above the limit is named before it is sent. */
document.addEventListener("change", (event) => {
  const field = event.target;
  if (!field.matches("input[type=file][data-max-bytes]")) return;
  const isTooLarge = field.files.length && field.files[0].size > Number(field.dataset.maxBytes);
  field.setCustomValidity(isTooLarge ? field.dataset.tooLarge : "");
  field.reportValidity();
});

/* A reply that is written comes as JSON strings; they are put into the page as text, never as HTML. */
function receive(element) {
  const source = new EventSource(element.dataset.reply);
  delete element.dataset.reply;
  source.onmessage = (event) => element.append(JSON.parse(event.data));
  source.addEventListener("end", () => {
    source.close();
    element.dispatchEvent(new CustomEvent("replied", { bubbles: true }));
  });
}

/* A recording of the microphone becomes a WAV file of 16 kHz, which every server that hears takes. */
function waveOf(samples, rate) {
  const view = new DataView(new ArrayBuffer(44 + 2 * samples.length));
  const text = (place, letters) => [...letters].forEach((letter, index) => view.setUint8(place + index, letter.charCodeAt(0)));
  text(0, "RIFF"); view.setUint32(4, 36 + 2 * samples.length, true); text(8, "WAVEfmt ");
  view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
  view.setUint32(24, rate, true); view.setUint32(28, 2 * rate, true); view.setUint16(32, 2, true); view.setUint16(34, 16, true);
  text(36, "data"); view.setUint32(40, 2 * samples.length, true);
  samples.forEach((sample, index) => view.setInt16(44 + 2 * index, Math.max(-1, Math.min(1, sample)) * 32767, true));
  return new File([view.buffer], "recording.wav", { type: "audio/wav" });
}

async function sampled(blob, rate) {
  const decoder = new AudioContext();
  const whole = await decoder.decodeAudioData(await blob.arrayBuffer());
  await decoder.close();
  const resampler = new OfflineAudioContext(1, Math.max(1, Math.ceil(whole.duration * rate)), rate);
  const source = new AudioBufferSourceNode(resampler, { buffer: whole });
  source.connect(resampler.destination);
  source.start();
  return (await resampler.startRendering()).getChannelData(0);
}

async function record(button) {
  const form = button.form, status = form.querySelector("[data-recorded]"), label = button.textContent;
  let stream;
  try {
    stream = await navigator.mediaDevices.getUserMedia({ audio: true });
  } catch (error) {
    status.textContent = button.dataset.refused;
    button.dataset.recording = "";
    return;
  }
  const recorder = new MediaRecorder(stream), parts = [];
  recorder.ondataavailable = (event) => parts.push(event.data);
  recorder.onstop = async () => {
    stream.getTracks().forEach((track) => track.stop());
    button.textContent = label;
    button.dataset.recording = "";
    const samples = await sampled(new Blob(parts, { type: recorder.mimeType }), 16000);
    const chosen = new DataTransfer();
    chosen.items.add(waveOf(samples, 16000));
    const field = form.querySelector("input[type=file]");
    field.files = chosen.files;
    field.dispatchEvent(new Event("change", { bubbles: true }));
    status.textContent = `${(samples.length / 16000).toFixed(1)} s`;
  };
  button.textContent = button.dataset.stop;
  recorder.start();
  button.addEventListener("click", () => recorder.stop(), { once: true });
}

/* Of a page, and of each part that htmx has renewed. */
function prepare(root) {
  root.querySelectorAll("[data-reply]").forEach(receive);
  if (navigator.mediaDevices && window.MediaRecorder) root.querySelectorAll("[data-record]").forEach((button) => { button.hidden = false; });
}
document.addEventListener("DOMContentLoaded", () => prepare(document));
document.addEventListener("htmx:afterSettle", () => prepare(document));
document.addEventListener("click", (event) => {
  const button = event.target.closest("[data-record]");
  if (button && button.dataset.recording !== "true") {
    button.dataset.recording = "true";
    record(button);
  }
});
