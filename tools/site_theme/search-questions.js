/* What is typed into the search may be a question, in other words than those of the pages. The search takes each word for the beginning of a
   word and adds up what it finds, so that "how" and "a" would count as much as the words that matter. So fillers are left out unless nothing
   else is there, the others lose their endings, and our word stands beside the reader's. */
(() => {
  const FILLERS = new Set(
    ("a about all am an and any are as at be been behind being beside but by can cannot could did do does doing done for from get go goes good had " +
     "has have having how i if in into is it its just like long make many may me mean means more most much must my myself new no not now of on " +
     "one ones only or other our ours own put say several shall she should so some still such take than that the their them then there these " +
     "they this those to too type under up us use very want wants was we were what when where which while who whom whose why will with " +
     "without would you your yours").split(" "),
  );
  // word as it is reduced -> what the pages call it
  const OURS = {
    addres: "serve team",
    base: "starter",
    chat: "talk",
    classifier: "classification",
    com: "lineage inspect",
    contribut: "contributing",
    crash: "resume killed",
    delet: "forget revoke",
    gemma: "licence",
    hear: "audio recordings speech",
    interrupt: "stopped killed resume",
    leav: "network telemetry",
    llama: "licence gguf",
    machin: "network",
    nat: "glossary",
    offlin: "network",
    photo: "images",
    pictur: "images",
    privat: "personal",
    prov: "evidence",
    remov: "revoke",
    rollback: "undo previous",
    sit: "federation clients",
    speak: "speech voice",
    support: "limits",
    together: "federation",
    umlaut: "encodings characters",
    touch: "reaches",
    undo: "rollback",
    updat: "publish sync",
    waiver: "release adapter",
    word: "glossary",
  };
  const ENDINGS = /(?<=\w{3})(?:ing|ed|es|s|e)$/;

  function reduced(query) {
    if (/["+*^~]/.test(query)) return query; // the search's own operators are for those who know them
    const words = query.replace(/[?!,:;()]+/g, " ").replace(/(?<!\S)-+/g, "").trim().split(/\s+/);
    const kept = words.filter((word) => !FILLERS.has(word.toLowerCase()));
    const stems = (kept.length ? kept : words).map((word) => word.replace(ENDINGS, ""));
    return stems.flatMap((stem) => [stem, OURS[stem.toLowerCase()] ?? []].flat()).join(" ");
  }

  const Plain = window.Worker;
  window.Worker = class extends Plain {
    postMessage(message, ...others) {
      const isQuery = message && message.type === 2;
      super.postMessage(isQuery ? { ...message, data: reduced(message.data) } : message, ...others);
    }
  };
})();
