// Media on the page: chosen, dropped, pasted, drawn or recorded here, and kept as text in a hidden field.
"use strict";
(() => {
  const MOST = 14e6, SIDE = 1600, RATE = 16000;

  function keep(where, url) {
    const field = document.querySelector(`#${where} textarea, #${where} input`);
    if (!field) return;
    const type = field instanceof HTMLTextAreaElement ? HTMLTextAreaElement : HTMLInputElement;
    Object.getOwnPropertyDescriptor(type.prototype, "value").set.call(field, url);
    field.dispatchEvent(new Event("input", { bubbles: true }));
  }

  // The items that a hidden field holds, each [id, title], changed and kept.
  function change(where, act) {
    const field = document.querySelector(`#${where} textarea, #${where} input`);
    if (field) keep(where, JSON.stringify(act(JSON.parse(field.value || "[]"))));
  }

  function read(blob) {
    return new Promise((done, failed) => {
      const reader = new FileReader();
      reader.onload = () => done(reader.result);
      reader.onerror = () => failed(reader.error);
      reader.readAsDataURL(blob);
    });
  }

  // An image as the server takes it: as it is where it is small, else reduced here.
  async function image(file) {
    const bitmap = await createImageBitmap(file);
    if (file.size < 2e6 && Math.max(bitmap.width, bitmap.height) <= SIDE && /png|jpeg|webp|gif/.test(file.type)) return read(file);
    const scale = Math.min(1, SIDE / Math.max(bitmap.width, bitmap.height));
    const canvas = document.createElement("canvas");
    canvas.width = Math.max(1, Math.round(bitmap.width * scale));
    canvas.height = Math.max(1, Math.round(bitmap.height * scale));
    canvas.getContext("2d").drawImage(bitmap, 0, 0, canvas.width, canvas.height);
    return canvas.toDataURL("image/png");
  }

  // Any audio that the browser can play, as a mono WAV of 16 kHz and at most 60 seconds.
  async function audio(file) {
    const context = new OfflineAudioContext(1, 1, RATE);
    const buffer = await context.decodeAudioData(await file.arrayBuffer());
    const count = Math.min(buffer.length, 60 * RATE);
    const view = new DataView(new ArrayBuffer(44 + 2 * count));
    const text = (at, value) => [...value].forEach((c, i) => view.setUint8(at + i, c.charCodeAt(0)));
    text(0, "RIFF"); view.setUint32(4, 36 + 2 * count, true); text(8, "WAVEfmt ");
    view.setUint32(16, 16, true); view.setUint16(20, 1, true); view.setUint16(22, 1, true);
    view.setUint32(24, RATE, true); view.setUint32(28, 2 * RATE, true); view.setUint16(32, 2, true);
    view.setUint16(34, 16, true); text(36, "data"); view.setUint32(40, 2 * count, true);
    const channels = Array.from({ length: buffer.numberOfChannels }, (_, i) => buffer.getChannelData(i));
    for (let i = 0; i < count; i++) {
      const value = channels.reduce((sum, channel) => sum + channel[i], 0) / channels.length;
      view.setInt16(44 + 2 * i, Math.max(-1, Math.min(1, value)) * 32767, true);
    }
    return (await read(new Blob([view], { type: "audio/wav" }))).replace(/^data:[^;]*/, "data:audio/wav");
  }

  function place(box) {
    const where = box.dataset.to, tools = box.dataset.tools.split(" "), white = box.dataset.ink === "white";
    const bar = document.createElement("div"), shown = document.createElement("div"), told = document.createElement("p");
    bar.className = "tools"; shown.className = "shown"; told.className = "told";
    const kinds = tools.filter((tool) => tool !== "draw").map((kind) => (kind === "image" ? "an image" : "an audio clip"));
    told.textContent = `Choose, drop or paste ${kinds.join(" or ")}${tools.includes("draw") ? ", or draw one" : ""}.`;

    function show(url) {
      shown.replaceChildren();
      if (!url) return;
      const view = document.createElement(url.startsWith("data:audio") ? "audio" : "img");
      view.src = url;
      if (view.tagName === "AUDIO") view.controls = true; else view.alt = "what is asked about";
      shown.append(view);
    }
    box.plait = (url) => {
      if (url.length > MOST) { told.textContent = "That is too large: at most 10 MB."; return; }
      keep(where, url); show(url);
    };
    box.plaitForget = () => show("");

    async function take(file) {
      try {
        box.plait(file.type.startsWith("audio") || file.type.startsWith("video") ? await audio(file) : await image(file));
      } catch { told.textContent = "That file cannot be read as an image or an audio clip."; }
    }
    function button(label, act) {
      const made = document.createElement("button");
      made.type = "button"; made.textContent = label; made.addEventListener("click", () => act(made)); bar.append(made);
      return made;
    }

    const input = document.createElement("input");
    input.type = "file"; input.hidden = true;
    input.accept = tools.filter((tool) => tool !== "draw").map((kind) => `${kind}/*`).join(",");
    input.addEventListener("change", () => { if (input.files[0]) take(input.files[0]); input.value = ""; });
    button("Choose a file", () => input.click());

    if (tools.includes("draw")) button("Draw", () => {
      const canvas = document.createElement("canvas"), pen = canvas.getContext("2d");
      canvas.width = canvas.height = 256;
      const clean = () => { pen.fillStyle = white ? "black" : "white"; pen.fillRect(0, 0, 256, 256); };
      clean();
      pen.strokeStyle = white ? "white" : "black"; pen.lineWidth = 22; pen.lineCap = pen.lineJoin = "round";
      const at = (event) => { const r = canvas.getBoundingClientRect(); return [((event.clientX - r.left) / r.width) * 256, ((event.clientY - r.top) / r.height) * 256]; };
      let down = false;
      canvas.addEventListener("pointerdown", (event) => {
        down = true; canvas.setPointerCapture(event.pointerId); pen.beginPath(); pen.moveTo(...at(event)); pen.lineTo(...at(event)); pen.stroke();
      });
      canvas.addEventListener("pointermove", (event) => { if (down) { pen.lineTo(...at(event)); pen.stroke(); } });
      canvas.addEventListener("pointerup", () => { down = false; keep(where, canvas.toDataURL("image/png")); });
      shown.replaceChildren(canvas);
    });

    if (tools.includes("audio") && navigator.mediaDevices && window.MediaRecorder) {
      let recorder = null;
      button("Record", async (made) => {
        if (recorder) { recorder.stop(); return; }
        try {
          const stream = await navigator.mediaDevices.getUserMedia({ audio: true }), pieces = [];
          recorder = new MediaRecorder(stream);
          recorder.addEventListener("dataavailable", (event) => pieces.push(event.data));
          recorder.addEventListener("stop", () => {
            stream.getTracks().forEach((track) => track.stop());
            made.textContent = "Record"; recorder = null;
            take(new Blob(pieces, { type: "audio/webm" }));
          });
          recorder.start(); made.textContent = "Stop";
          setTimeout(() => recorder && recorder.stop(), 30000);
        } catch { told.textContent = "The microphone cannot be used here."; }
      });
    }
    button("Clear", () => { keep(where, ""); show(""); });
    box.addEventListener("dragover", (event) => { event.preventDefault(); box.classList.add("over"); });
    box.addEventListener("dragleave", () => box.classList.remove("over"));
    box.addEventListener("drop", (event) => {
      event.preventDefault(); box.classList.remove("over");
      if (event.dataTransfer.files[0]) take(event.dataTransfer.files[0]);
    });
    box.tabIndex = 0;
    box.addEventListener("paste", (event) => { if (event.clipboardData.files[0]) take(event.clipboardData.files[0]); });
    box.replaceChildren(bar, input, shown, told);
  }

  document.addEventListener("click", (event) => {
    const example = event.target.closest(".plait-example");
    if (example && example.dataset.act) {
      const { act, id, title } = example.dataset;
      if (act === "add") change("recommend-history", (list) => [...list.filter((one) => one[0] !== id), [id, title]]);
      else if (act === "drop") change("recommend-history", (list) => list.filter((one) => one[0] !== id));
      else keep("recommend-liked", JSON.stringify([[id, title, Date.now()]]));
    } else if (example && example.dataset.text !== undefined) keep(example.dataset.to, example.dataset.text);
    else if (example) {
      const box = document.querySelector(`.plait-media[data-to="${example.dataset.to}"]`);
      if (box && box.plait) box.plait(example.dataset.url);
    }
    if (event.target.closest("#chat-go, #chat-new")) setTimeout(() => {
      document.querySelectorAll('.plait-media[data-to="chat-medium"]').forEach((box) => box.plaitForget && box.plaitForget());
    }, 500);
  });
  new MutationObserver(() => {
    document.querySelectorAll(".plait-media").forEach((box) => { if (!box.plait) place(box); });
  }).observe(document.documentElement, { childList: true, subtree: true });
})();
