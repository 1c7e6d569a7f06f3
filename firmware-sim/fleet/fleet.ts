import { existsSync, mkdirSync, writeFileSync } from 'node:fs'
import { connect, type Socket } from 'node:net'
import { join } from 'node:path'
import { setTimeout as pause } from 'node:timers/promises'
import { startAgent, type Agent, type AgentOptions, type AgentStatus } from '@fleetkey/device-agent/agent.ts'
import type { Settings } from '@fleetkey/device-agent/config.ts'
import type { FileSystem } from '@fleetkey/device-agent/filesystem.ts'
import type { Transport } from '@fleetkey/tpm2/transport.ts'
import type { Board } from '../board/board.ts'
import { stateFile } from '../board/state-file.ts'
import type { FactoryFolder } from '../factory/factory.ts'
import type { StageName } from '../release/release.ts'
import type { Habit } from './habits.ts'

export interface FleetOptions {
  readonly factory: FactoryFolder
  /** Server, tenant and trust, as every device of the fleet is configured. */
  readonly trust: Pick<Settings, 'server' | 'tenant' | 'trust'>
  /** One folder per device below this one: its TPM's state and its agent's files. */
  readonly data: string
  readonly files: FileSystem
  readonly random: (length: number) => Uint8Array
  readonly now: () => number
  readonly log: (line: string) => void
  /** Tokens for the boards that have no key of their own, in the order of their serials. */
  readonly tokens?: readonly string[]
  /** Boards whose flash is changed behind the manifest's back, and where. */
  readonly tampered: ReadonlyMap<string, StageName>
  /** Boards whose agent claims the serial of another. */
  readonly claims: ReadonlyMap<string, string>
  /** Agents that may be on their way to a connection at the same time. */
  readonly starting: number
  /** What its TPM and its clock are like; as they should be unless told. */
  readonly habit?: (serial: string) => Pick<Habit, 'tpmDelay' | 'clockOff'>
  /** Called at every named durable step of an agent; fault runs end the process there. */
  readonly step?: (name: string) => void
}

export interface Fleet {
  readonly serials: readonly string[]
  /** Boots these boards and starts their agents; resolves when all have started, connected or not. */
  on(serials: readonly string[]): Promise<void>
  /** Pulls their power: nothing is finished, nothing is said. */
  off(serials: readonly string[]): void
  /** Their agents stop in order, then they are off. */
  sleep(serials: readonly string[]): Promise<void>
  /** Breaks their network connections; the agents run on. */
  unplug(serials: readonly string[]): void
  /** A board's kernel measures one more file, as when a program runs for the first time since the boot. Throws when the board was never on. */
  measureFile(serial: string, path: string, content: Uint8Array): void
  /** The running agent; throws when the board is off or unknown. */
  agent(serial: string): Agent
  /** Of these boards, or all; null for one that is off. */
  status(of?: Iterable<string>): ReadonlyMap<string, AgentStatus | null>
  /** Agents stop in order. */
  stop(): Promise<void>
}

/** A start that got nowhere gives its place to the next after this. */
const patience = 15_000

/** A TPM that takes its time over each command. */
const slowed = (transport: Transport, delay: number): Transport => ({
  async send(command) {
    await pause(delay)
    return await transport.send(command)
  },
  close: async () => await transport.close(),
})

/** Many boards in one process, each with its own TPM, flash and files, each running the real agent. `tell` hears every change of a status. */
export const openFleet = (options: FleetOptions, tell: (serial: string, status: AgentStatus) => void): Fleet => {
  const { factory, random, now } = options
  const known = new Set(factory.serials)
  const boards = new Map<string, Board>()
  const agents = new Map<string, Agent>()
  /** What each agent has told last: thousands are counted many times a minute. */
  const told = new Map<string, AgentStatus>()
  /** Starts that wait for their turn, by serial; a board that is switched off meanwhile is no longer among them. */
  const queue = new Map<string, () => void>()
  const cables = new Map<string, Socket>()
  /** Ends the wait for a start that is over: the board is off again. */
  const starts = new Map<string, () => void>()
  let starting = 0
  /** Boards between their place in the queue and their agent: a second order to switch them on must not give them a second one. */
  const launching = new Map<string, { isOff: boolean }>()

  const boardOf = async (serial: string): Promise<Board> => {
    const present = boards.get(serial)
    if (present !== undefined) return present
    const folder = join(options.data, serial)
    mkdirSync(folder, { recursive: true, mode: 0o700 })
    const state = stateFile(join(folder, 'tpm.state'))
    const board = await factory.board(serial, { random, now, state: state.read(), save: state.write })
    const stage = options.tampered.get(serial)
    if (stage !== undefined) board.flash.tamper(stage, (bytes) => bytes.map((byte, at) => (at === 100 ? byte ^ 1 : byte)))
    boards.set(serial, board)
    return board
  }

  const tokenOf = new Map(factory.serials.filter((serial) => factory.methodOf(serial) === 'token').map((serial, at) => [serial, options.tokens?.[at]]))

  /** A token is laid beside a board that was never switched on. */
  const tokenFile = (serial: string): string => {
    const folder = join(options.data, serial)
    const path = join(folder, 'enrolment.token')
    const token = tokenOf.get(serial)
    mkdirSync(folder, { recursive: true, mode: 0o700 })
    if (token !== undefined && !existsSync(join(folder, 'agent'))) writeFileSync(path, `${token}\n`, { mode: 0o600 })
    return path
  }

  /** What a board proves itself with, switched on. */
  const powered = async (
    serial: string,
  ): Promise<Pick<AgentOptions, 'openTpm' | 'secureElement' | 'readEventLog' | 'readImaList'> & { settings: Pick<Settings, 'tpm' | 'token'> }> => {
    const method = factory.methodOf(serial)
    if (method !== 'tpm2' && options.tampered.has(serial)) throw new Error('no TPM: nothing would notice that its flash was changed')
    if (method === 'idevid') return { settings: { tpm: null }, secureElement: await factory.element(serial) }
    if (method === 'token') return { settings: { tpm: null, token: tokenFile(serial) } }
    const board = await boardOf(serial)
    board.boot()
    const delay = options.habit?.(serial).tpmDelay ?? 0
    const transport = (): Transport => (delay === 0 ? board.transport() : slowed(board.transport(), delay))
    return {
      settings: { tpm: 'in-process' },
      openTpm: async () => transport(),
      readEventLog: async () => board.eventLog(),
      readImaList: async function* () {
        yield board.imaList()
      },
    }
  }

  const startOne = async (serial: string): Promise<void> => {
    const launch = { isOff: false }
    launching.set(serial, launch)
    const { settings: proof, ...hardware } = await powered(serial).finally(() => launching.delete(serial))
    if (launch.isOff) return
    const settings: Settings = {
      ...options.trust,
      ...proof,
      data: join(options.data, serial, 'agent'),
      serial: options.claims.get(serial) ?? serial,
      eventLog: null,
      socket: null,
      outputs: [],
    }
    const clockOff = options.habit?.(serial).clockOff ?? 0
    const agent = startAgent({
      settings,
      ...hardware,
      files: options.files,
      now: () => now() + clockOff,
      dial(to) {
        const cable = connect(to)
        cables.set(serial, cable)
        cable.on('error', () => undefined)
        cable.once('close', () => {
          if (cables.get(serial) === cable) cables.delete(serial)
        })
        return cable
      },
      random,
      log: (line) => options.log(`${serial}: ${line}`),
      step: options.step ?? (() => undefined),
    })
    agents.set(serial, agent)
    told.set(serial, agent.status())
    const settled = Promise.withResolvers<void>()
    starts.set(serial, settled.resolve)
    const timer = setTimeout(settled.resolve, patience)
    agent.onChange((status) => {
      told.set(serial, status)
      tell(serial, status)
      if (status.connected || status.lastRefusal !== null || status.state === 'failed' || status.state === 'waiting') settled.resolve()
    })
    await settled.promise
    starts.delete(serial)
    clearTimeout(timer)
  }

  const pump = (): void => {
    while (starting < options.starting) {
      const [next] = queue
      if (next === undefined) return
      const [serial, done] = next
      queue.delete(serial)
      starting++
      void startOne(serial)
        .catch((thrown: unknown) => options.log(`${serial}: ${thrown instanceof Error ? thrown.message : String(thrown)}`))
        .finally(() => {
          starting--
          done()
          pump()
        })
    }
  }

  const leaveQueue = (serial: string): void => {
    const launch = launching.get(serial)
    if (launch !== undefined) launch.isOff = true
    queue.get(serial)?.()
    queue.delete(serial)
  }

  const mustKnow = (serials: readonly string[]): void => {
    for (const serial of serials) if (!known.has(serial)) throw new Error(`no board ${serial} in this batch`)
  }

  return {
    serials: factory.serials,
    async on(serials) {
      mustKnow(serials)
      const waiting = serials
        .filter((serial) => !agents.has(serial) && !queue.has(serial) && launching.get(serial)?.isOff !== false)
        .map(async (serial) => await new Promise<void>((done) => void queue.set(serial, done)))
      pump()
      await Promise.all(waiting)
    },
    off(serials) {
      mustKnow(serials)
      for (const serial of serials) {
        leaveQueue(serial)
        agents.get(serial)?.kill()
        agents.delete(serial)
        starts.get(serial)?.()
      }
    },
    async sleep(serials) {
      mustKnow(serials)
      await Promise.all(
        serials.map(async (serial) => {
          leaveQueue(serial)
          const agent = agents.get(serial)
          await agent?.stop()
          if (agents.get(serial) === agent) agents.delete(serial)
          starts.get(serial)?.()
        }),
      )
    },
    unplug(serials) {
      mustKnow(serials)
      for (const serial of serials) cables.get(serial)?.destroy()
    },
    measureFile(serial, path, content) {
      mustKnow([serial])
      const board = boards.get(serial)
      if (board === undefined) throw new Error(`board ${serial} is off`)
      board.measureFile(path, content)
    },
    agent(serial) {
      mustKnow([serial])
      const agent = agents.get(serial)
      if (agent === undefined) throw new Error(`board ${serial} is off`)
      return agent
    },
    status: (of = factory.serials) => new Map([...of].map((serial) => [serial, agents.has(serial) ? (told.get(serial) ?? null) : null])),
    async stop() {
      for (const serial of queue.keys()) leaveQueue(serial)
      await Promise.all([...agents.values()].map(async (agent) => await agent.stop()))
      agents.clear()
    },
  }
}
