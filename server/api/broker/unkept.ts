import { Readable } from 'node:stream'

/*
 * What the broker library would keep and hand around by itself. Here it keeps nothing and hands nothing around: sessions are clean, nothing is retained, no will is
 * taken, QoS 2 is refused, every message from a device ends in the handler and every message to one is written straight to its connection. Its own memory for all
 * that cost each connection several streams, a place in a tree of topics and three messages about itself that nobody hears.
 */

const nothing = async (): Promise<void> => await Promise.resolve()
const none = async (): Promise<readonly never[]> => await Promise.resolve([])
/** As its own memory answers to a message that is not there. */
const missing = async (): Promise<never> => await Promise.reject(new Error('no such packet'))
const empty = (): Readable => Readable.from([])

/** The library's persistence (aedes-persistence 11), empty for good. */
export const noStorage = () => ({
  setup: async (): Promise<void> => await Promise.resolve(),
  subscriptionsByTopic: none,
  subscriptionsByClient: none,
  cleanSubscriptions: nothing,
  addSubscriptions: nothing,
  removeSubscriptions: nothing,
  storeRetained: nothing,
  /** The library pipes it into a stream that it makes for each subscription: nothing comes, and nobody waits for its end. */
  createRetainedStreamCombi: () => ({ pipe: () => undefined }),
  outgoingEnqueue: nothing,
  outgoingEnqueueCombi: nothing,
  outgoingUpdate: missing,
  outgoingClearMessageId: nothing,
  outgoingStream: empty,
  incomingStorePacket: missing,
  incomingGetPacket: missing,
  incomingDelPacket: missing,
  cleanIncoming: nothing,
  putWill: nothing,
  delWill: nothing,
  streamWill: empty,
})

type Done = (error?: Error | null) => void

/** The library's emitter (mqemitter 7) without anybody who listens. */
export const noEmitter = () => ({
  on: (_topic: string, _hear: unknown, done?: Done): void => void (done !== undefined && setImmediate(done)),
  removeListener: (_topic: string, _hear: unknown, done?: Done): void => void (done !== undefined && setImmediate(done)),
  emit: (_packet: unknown, done?: Done): void => done?.(),
  close: (done: Done): void => void setImmediate(done),
})
