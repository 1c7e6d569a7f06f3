import { toProblem } from '@fleetkey/protocol/problem.ts'
import { DeviceId } from '@fleetkey/protocol/ids.ts'
import { checkpointText, signedCheckpoint } from '@fleetkey/server/audit/checkpoint.ts'
import { exportFooter, exportHeader, exportLine } from '@fleetkey/server/audit/export.ts'
import { hasIdentity } from '@fleetkey/server/fleet/device.ts'
import { isUnfinished } from '@fleetkey/server/campaigns/campaign.ts'
import { windowAt, type Window } from '@fleetkey/server/campaigns/window.ts'
import { keyGenerationOf } from '@fleetkey/server/flows/approvals.ts'
import { advanceCampaign, confirmCut, approveCampaign, controlCampaign, retryCampaign, rollBack } from '@fleetkey/server/flows/campaign-order.ts'
import type { Context, Store } from '@fleetkey/server/flows/context.ts'
import { addMembers, removeMember, setGroupPolicy } from '@fleetkey/server/flows/group.ts'
import { tagDevice } from '@fleetkey/server/flows/group-query.ts'
import { importRelease } from '@fleetkey/server/flows/import-release.ts'
import { setKeyPolicy } from '@fleetkey/server/flows/key-policy.ts'
import { revokeDevice } from '@fleetkey/server/flows/revoke.ts'
import { keptOverlaps, maxOverlaps, rotateCompromised, startRotation } from '@fleetkey/server/flows/rotate.ts'
import { reinstateDevice, suspendDevice } from '@fleetkey/server/flows/suspend.ts'
import { usedOf } from '@fleetkey/server/flows/usage.ts'
import { withdrawRelease } from '@fleetkey/server/flows/withdraw-release.ts'
import { isUsedUp } from '@fleetkey/server/keys/cryptoperiod.ts'
import { filePowerFailingAt } from '@fleetkey/device-agent/memory-filesystem.ts'
import { evidenceOf } from '../invariants/agent-evidence.ts'
import { rows } from '../invariants/evidence.ts'
import { invariants } from '../invariants/invariants.ts'
import { openBoard, type SimulatedBoard } from './board.ts'
import { diceOf, type Dice } from './dice.ts'
import { idOf, installable, isAcceptable, openedByThieves } from './firmware.ts'
import { openNetwork } from './network.ts'
import { Crashed, startSimulatedServer, tenant, type SimulatedServer } from './server.ts'
import { virtualTime } from './time.ts'
import { nothingOutsideItsWindow } from './windows.ts'
import { alice, firmware, group, type Fleet } from './world.ts'

/** What one schedule came to. */
export interface Outcome {
  readonly seed: number
  /** Everything that was done, in its order and with its virtual time: the same for the same seed. */
  readonly trace: readonly string[]
  /** What went wrong; null when nothing did. */
  readonly failure: string | null
  readonly kills: { readonly server: number; readonly device: number }
  /** Virtual milliseconds from the end of all trouble until the fleet was at rest. */
  readonly recovery: number
  readonly treated: Readonly<Record<string, number>>
  /** How often it came to what comes about rarely. */
  readonly met: Readonly<Record<'windows' | 'usage limits' | 'moves' | 'older disks' | 'withdrawals' | 'thefts', number>>
}

const minute = 60_000
const hour = 60 * minute
const day = 24 * hour

const bob: typeof alice = { ...alice, id: 'bob' } as typeof alice

type Direction = 'pause' | 'resume' | 'abort' | 'retry' | 'rollback' | 'advance' | 'approve'

/** An operator's order against a campaign; what needs a second person is the second person's. */
const direct = async (ctx: Context, what: Direction, id: string): Promise<unknown> => {
  switch (what) {
    case 'retry':
      return await retryCampaign(ctx, alice, id)
    case 'rollback':
      return await rollBack(ctx, alice, id)
    case 'advance':
      return await advanceCampaign(ctx, alice, id)
    case 'approve':
      return await approveCampaign(ctx, bob, id)
    default:
      return await controlCampaign(ctx, alice, id, { order: what })
  }
}

/** The log of a store as its export, checkpoint included. */
const exported = async (store: Store, { kms, auditKey }: Pick<Fleet, 'kms' | 'auditKey'>): Promise<string> => {
  const { size, root } = await store.checkpoint()
  const head = { origin: `fleetkey/${tenant}`, size, root }
  const [signature] = await kms.sign([{ key: 'audit-signing', purpose: 'audit-signing', data: new TextEncoder().encode(checkpointText(head)) }])
  if (signature === undefined) throw new Error('no signature')
  const entries = await store.audit({ after: 0, limit: size })
  return exportHeader + entries.map(exportLine).join('') + exportFooter(signedCheckpoint(head, { spki: auditKey, signature }))
}

/**
 * One schedule: a copy of the fleet, then operators at work and trouble in an order that the seed decides: the server is killed at its durable steps and
 * anywhere, boards lose power in the middle of a write, lines break, the broker turns hostile, the disk is full, clocks are wrong. Then calm; the fleet has to
 * come to rest, and every invariant has to hold.
 */
export const runSchedule = async (fleet: Fleet, seed: number): Promise<Outcome> => {
  const { keys } = fleet
  const dice = diceOf(seed)
  const time = virtualTime(fleet.at)
  const trace: string[] = []
  const tell = (line: string): void => void trace.push(`${((time.now() - fleet.at) / 1000).toFixed(3)} ${line}`)
  const network = openNetwork({ time, dice: dice.fork() })
  const store = fleet.store.fork()
  const history: { device: string; key: string; epoch: number }[] = []
  const kills = { server: 0, device: 0 }
  const surprises: string[] = []
  const met = { windows: 0, 'usage limits': 0, moves: 0, 'older disks': 0, withdrawals: 0, thefts: 0 }
  let isFull = false
  let server: SimulatedServer | undefined
  let crashNow: (() => void) | undefined
  let countdown = Number.POSITIVE_INFINITY
  /** What lay on a board's medium when it lost power, and how often an older copy was put in its place: it knows of nothing newer then. */
  const made: ReadonlyMap<string, ReadonlyMap<string, Uint8Array>> = new Map(fleet.boards.map(({ blank, contents }) => [blank.serial.toLowerCase(), contents]))
  const copies = new Map(made)
  const lives = new Map<string, number>()

  const log = (line: string): void => {
    tell(`  server: ${line}`)
    // What no flow expected is a fault, whoever sent what.
    if (/\binternal\b|TypeError|RangeError|is not a function|undefined/i.test(line)) surprises.push(line)
  }
  const crash = (where: string): void => {
    tell(`the server is killed: ${where}`)
    kills.server++
    countdown = Number.POSITIVE_INFINITY
    server = undefined
    const crashing = crashNow
    crashNow = undefined
    crashing?.()
  }
  const start = async (): Promise<void> => {
    if (crashNow !== undefined) return
    tell('the server starts')
    try {
      server = await startSimulatedServer({
        store,
        network,
        time,
        log,
        kms: fleet.kms,
        random: dice.fork().bytes,
        isFull: () => isFull,
        begun: (with_) => (crashNow = with_),
        step: (name) => {
          tell(`  step ${name}`)
          if (--countdown >= 0) return
          crash(`at ${name}`)
          throw new Crashed(name)
        },
      })
    } catch (thrown) {
      if (!(thrown instanceof Crashed) && toProblem(thrown).code !== 'unavailable') throw thrown
      tell('it ended while it started')
      if (crashNow !== undefined) crash('it could not start')
    }
  }

  const boards = fleet.boards.map((one): SimulatedBoard => {
    const board = openBoard({
      ...one,
      network,
      time,
      log: (line) => tell(`  ${line}`),
      trust: fleet.trust,
      dice: dice.fork(),
      inUse: (key, epoch) => {
        const device = `${board.device} ${lives.get(board.device) ?? 0}`
        const last = history.findLast((one) => one.device === device && one.key === key)
        if (last?.epoch !== epoch) history.push({ device, key, epoch })
      },
    })
    return board
  })

  const measured = boards.filter(({ hasTpm }) => hasTpm)
  let newest = 1
  /** Boards whose owner does not update them any more. */
  const leftBehind = new Set<SimulatedBoard>()

  /** What an operator asks for; a refusal is an answer, a crash in the middle is trouble as any other. */
  const order = (what: string, work: (ctx: Context) => Promise<unknown>): void => {
    const to = server
    if (to === undefined) return
    tell(`order: ${what}`)
    work(to.ctx).then(
      () => tell(`  done: ${what}`),
      (thrown: unknown) => {
        const problem = toProblem(thrown)
        tell(`  refused: ${what}: ${problem.code} ${problem.message}`)
        if (problem.code === 'internal' && !(thrown instanceof Crashed) && server === to) surprises.push(`${what}: ${problem.message}`)
      },
    )
  }
  const anyCampaign = async (ctx: Context): Promise<string> => {
    const open = (await rows(ctx.store, 'campaign')).filter(({ state }) => isUnfinished(state))
    return open.length === 0 ? 'none' : dice.pick(open).id
  }

  /** What an application does with a key. Whether it can is the moment's matter: no key yet, no power any more. */
  const use = async (agent: SimulatedBoard['agent'], id: string): Promise<unknown> => {
    const isBound = keys.some((key) => key.id === id && key.protection === 'tpm')
    return await Promise.resolve(isBound ? agent?.mac(id, new Uint8Array(16)) : agent?.encrypt(id, new Uint8Array(16))).catch(() => undefined)
  }

  const switchOn = (board: SimulatedBoard, roll: Dice): void => {
    const how = {
      ...(roll.once(8) ? { clock: roll.pick([-time.now(), 79 * 365 * 24 * hour, -3 * hour, 5 * minute]) } : {}),
      ...(roll.once(4) ? { power: filePowerFailingAt(roll.roll(12)) } : {}),
      ...(roll.once(4) ? { steps: roll.roll(8) } : {}),
    }
    tell(`${board.device} is switched on ${Object.keys(how).join(', ')}`)
    board.switchOn(how)
  }

  /** A maintenance window of every day that is open now, or soon. */
  const windowNear = (): Window => {
    const from = (Math.floor((time.now() % day) / minute) + dice.between(-20, 10) + 1440) % 1440
    return { from, minutes: dice.between(10, 60), days: [0, 1, 2, 3, 4, 5, 6], offset: 0 }
  }

  const deeds: readonly (readonly [weight: number, deed: () => Promise<void> | void])[] = [
    [
      5,
      () => {
        const { id } = dice.pick(keys)
        const deadline = dice.pick([5_000, 30_000, 5 * minute])
        const waves = dice.pick([[1], [0.5, 1]])
        const policy = {
          waves,
          deadline,
          retries: dice.pick([0, 0, 1, 2]),
          concurrency: dice.pick([null, null, 1]),
          soak: dice.pick([0, 0, 20_000]),
          advance: dice.pick(['automatic', 'automatic', 'manual'] as const),
          approval: dice.once(4),
          targets: dice.pick(['frozen', 'live'] as const),
          silent: dice.pick(['success', 'success', 'error', 'neither'] as const),
          overlap: dice.pick(['patient', 'patient', 'strict'] as const),
          canary: dice.once(6) ? group : null,
          window: deadline < 10 * minute && dice.once(8) ? windowNear() : null,
          startAt: dice.once(6) ? time.now() + dice.between(1_000, 5 * minute) : null,
          errorThreshold: dice.pick([0.1, 0.5, 1]),
          successThreshold: dice.pick([0, 0.5, 0.95]),
        }
        const epoch = dice.once(5) ? ('current' as const) : ('next' as const)
        order(`rotate ${id} to its ${epoch} epoch`, async (ctx) => await startRotation(ctx, alice, id, { policy, epoch, because: 'simulated' }))
      },
    ],
    [
      1,
      () => {
        const { id } = dice.pick(keys)
        order(`${id} is compromised`, async (ctx) => await rotateCompromised(ctx, alice, id, 'simulated'))
      },
    ],
    [
      2,
      async () => {
        const { id } = dice.pick(keys)
        const { agent, device } = dice.pick(boards)
        const times = dice.between(1, 3)
        tell(`an application of ${device} uses ${id} ${times} times`)
        for (let used = 0; used < times; used++) await use(agent, id)
      },
    ],
    [
      2,
      async () => {
        const { id } = dice.pick(keys)
        const limit = dice.pick([2, 8, null])
        order(`${id} is for ${limit ?? 'any number of'} messages`, async (ctx) => await setKeyPolicy(ctx, alice, id, { usageLimit: limit }))
        tell(`every application uses ${id}`)
        for (const { agent } of boards) for (let used = 0; used < 2; used++) await use(agent, id)
      },
    ],
    [
      2,
      () => {
        const id = DeviceId.parse(dice.pick(boards).device)
        const site = dice.pick(['a', 'a', 'b', null])
        order(`${id} stands at site ${site ?? 'unknown'}`, async (ctx) => {
          await tagDevice(ctx, alice, id, { site })
          met.moves++
        })
      },
    ],
    [
      1,
      () => {
        const board = dice.pick(boards)
        const copy = copies.get(board.device)
        if (copy === undefined) return
        tell(`an older copy of the medium of ${board.device} is put in its place`)
        lives.set(board.device, (lives.get(board.device) ?? 0) + 1)
        board.restore(copy)
        met['older disks']++
        switchOn(board, dice)
      },
    ],
    [
      1,
      async () => {
        const board = dice.pick(boards)
        tell(`${board.device} misses five rotations`)
        board.cut({ keep: true })
        const policy = { deadline: 1_000, successThreshold: 0, errorThreshold: 1 }
        for (let rotation = 0; rotation < 5; rotation++) {
          const { id } = dice.pick(keys)
          order(
            `rotate ${id} without ${board.device}`,
            async (ctx) => await startRotation(ctx, alice, id, { policy, supersede: 'aborted', because: 'simulated' }),
          )
          await time.run(20_000)
        }
        board.switchOn()
      },
    ],
    [
      3,
      () => {
        const messages = dice.roll(12)
        tell(`a line will break under a message, ${messages} from now`)
        network.severAfter(messages)
      },
    ],
    [
      3,
      () => {
        const what = dice.pick(['pause', 'resume', 'resume', 'abort', 'retry', 'rollback', 'advance', 'approve'] as const)
        order(`${what} a campaign`, async (ctx) => await direct(ctx, what, await anyCampaign(ctx)))
      },
    ],
    [
      2,
      () => {
        const id = DeviceId.parse(dice.pick(boards).device)
        order(`${id} leaves`, async (ctx) => await removeMember(ctx, alice, group, id))
      },
    ],
    [
      3,
      () => {
        const id = DeviceId.parse(dice.pick(boards).device)
        order(`${id} joins`, async (ctx) => await addMembers(ctx, alice, group, { devices: [id] }))
      },
    ],
    [
      1,
      () => {
        const id = DeviceId.parse(dice.pick(boards).device)
        order(`suspend ${id}`, async (ctx) => await suspendDevice(ctx, alice, id, 'simulated'))
      },
    ],
    [
      3,
      () => {
        const change = {
          delivery: dice.pick(['broadcast', 'broadcast', 'unicast'] as const),
          rotateOnJoin: dice.once(3),
          history: dice.once(4),
          generationLife: dice.pick([60, 600, 31_536_000]),
        }
        order(`the group is served by ${change.delivery}`, async (ctx) => await setGroupPolicy(ctx, alice, group, change))
      },
    ],
    [
      2,
      () => {
        const id = DeviceId.parse(dice.pick(boards).device)
        order(`reinstate ${id}`, async (ctx) => await reinstateDevice(ctx, alice, id))
      },
    ],
    [
      1,
      () => {
        if (!dice.once(3)) return
        const id = DeviceId.parse(dice.pick(boards).device)
        order(`revoke ${id}`, async (ctx) => await revokeDevice(ctx, alice, id, 'stolen'))
      },
    ],
    [
      8,
      () => {
        countdown = dice.roll(12)
        tell(`the server will be killed ${countdown} steps from now`)
      },
    ],
    [
      4,
      () => {
        if (crashNow !== undefined) crash('anywhere')
      },
    ],
    [8, async () => await start()],
    [
      4,
      () => {
        const board = dice.pick(boards)
        tell(`${board.device} loses power`)
        kills.device++
        board.cut({ keep: dice.once(2) })
        if (dice.once(2)) copies.set(board.device, board.medium.contents())
      },
    ],
    [5, () => switchOn(dice.pick(boards), dice)],
    [
      3,
      () => {
        const { device } = dice.pick(boards)
        tell(`the line of ${device} breaks`)
        network.sever(device)
      },
    ],
    [
      2,
      () => {
        const is = dice.once(2)
        tell(is ? 'the broker is hostile' : 'the broker is honest')
        network.hostile(is)
      },
    ],
    [
      1,
      () => {
        isFull = !isFull
        tell(isFull ? 'the disk is full' : 'the disk has room')
      },
    ],
  ]
  /** With boards that measure what they run. */
  const firmwareDeeds: typeof deeds = [
    [
      2,
      () => {
        const release = firmware(++newest)
        order(`release ${idOf(release)} comes`, async (ctx) => await importRelease(ctx, alice, fleet.reference(release)))
      },
    ],
    [
      4,
      () => {
        const board = dice.pick(measured)
        const release = firmware(dice.once(4) ? dice.between(1, newest) : newest)
        tell(`${board.device} is updated to ${idOf(release)}`)
        board.install(release)
        switchOn(board, dice)
      },
    ],
    [
      6,
      () => {
        const id = idOf(firmware(dice.between(1, newest)))
        order(`release ${id} is withdrawn`, async (ctx) => {
          await withdrawRelease(ctx, alice, id, 'simulated')
          met.withdrawals++
        })
      },
    ],
  ]
  const lots = [...deeds, ...(measured.length > 0 ? firmwareDeeds : [])].flatMap(([weight, deed]) => Array.from({ length: weight }, () => deed))

  /** Everything that is out of place, for the first of which the fleet is not at rest. */
  const unrest = async (): Promise<string | undefined> => {
    for (const { id, state } of await rows(store, 'campaign')) if (isUnfinished(state) && state !== 'halted') return `campaign ${id} is ${state}`
    const [owed] = await store.find('setting', { prefix: 'owed-', limit: 1 })
    if (owed !== undefined) return `${owed.id} stays owed`
    const all = await rows(store, 'key')
    for (const key of all) {
      const open = (await store.find('campaign', { where: { key: key.id }, limit: 500 })).some(({ state }) => isUnfinished(state))
      const isDue = !open && isUsedUp(key, server === undefined ? 0 : await usedOf(server.ctx, `${key.id}/${key.current}`))
      if (isDue && server !== undefined && (await keptOverlaps(server.ctx, key.id)).length < maxOverlaps) return `${key.id} is used up and not rotated`
    }
    for (const board of boards) {
      const device = await store.get('device', board.device)
      if (device === undefined || !hasIdentity(device)) continue
      if (device.state === 'enrolled' && leftBehind.has(board)) return `${board.device} runs ${board.release?.manifest.name} and is not quarantined`
      if (device.state === 'quarantined' && leftBehind.has(board)) continue
      if (device.state === 'quarantined') return `${board.device} is quarantined: ${device.verdict.reason} ${device.verdict.detail}`
      const status = board.agent?.status()
      if (status?.connected !== true) return `${board.device} is not connected: ${status?.problem ?? 'no problem'}`
      if (status.locked) return `${board.device} is locked`
      const generation = server === undefined ? null : await keyGenerationOf(server.ctx, device)
      if (generation !== null && generation.keys !== generation.current)
        return `${board.device} has a recipient key of generation ${generation.keys}, not ${generation.current}`
      const holdings = await store.find('holding', { where: { device: board.device }, limit: 500 })
      for (const key of all) {
        const of = keys.find(({ id }) => id === key.id)?.group ?? group
        const isMember = (await store.get('member', `${of}/${board.device}`)) !== undefined && (key.protection === 'sealed' || board.hasTpm)
        const own = holdings.filter((one) => one.key === key.id && one.stage !== 'retired')
        const unsaid = own.find(({ epoch, stage }) => stage !== 'failed' && !status.holdings.some((held) => held.key === key.id && held.epoch === epoch))
        if (unsaid !== undefined && unsaid.stage !== 'delivered') return `${board.device} has not said that it erased ${unsaid.id}`
        if (!isMember && own.length > 0) return `${board.device} has left and holds ${own.map(({ id }) => id).join(', ')}`
        if (isMember && status.current[key.id] !== key.current) return `${board.device} uses ${key.id}/${status.current[key.id] ?? 'none'}, not ${key.current}`
        if (isMember && own.find(({ epoch }) => epoch === key.current)?.stage !== 'active') return `${board.device} has not proven ${key.id}/${key.current}`
      }
    }
    return undefined
  }

  let failure: string | null = null
  let recovery = 0
  try {
    await start()
    for (const board of boards) board.switchOn()
    await time.run(dice.between(0, 5_000))
    for (let deed = 0, count = dice.between(8, 30); deed < count; deed++) {
      await dice.pick(lots)()
      await time.run(dice.once(5) ? dice.between(0, 10 * minute) : dice.between(0, 3_000))
    }

    tell('calm')
    network.hostile(false)
    network.severAfter(Number.POSITIVE_INFINITY)
    isFull = false
    countdown = Number.POSITIVE_INFINITY
    for (const board of boards) board.calm()
    await start()
    for (const board of boards) if (board.agent === undefined || dice.once(2)) board.switchOn()
    const calm = time.now()
    // With an older disk a board has lost what a halted rotation had it install: that one is given up.
    if (lives.size > 0)
      for (const { id, state } of await rows(store, 'campaign'))
        if (state === 'halted') order('abort what has halted', async (ctx) => await direct(ctx, 'abort', id))
    await time.run(1_000)
    // The operators see to what waits for them.
    const resume = async (): Promise<void> => {
      const dated: SimulatedBoard[] = []
      for (const board of measured) if (!leftBehind.has(board) && !(await isAcceptable(store, board))) dated.push(board)
      if (dated.length > 0)
        order(`update ${dated.map(({ device }) => device).join(', ')}`, async (ctx) => {
          const known = await installable(store)
          const release = known ?? firmware(++newest)
          if (known === undefined) await importRelease(ctx, alice, fleet.reference(release))
          for (const board of dated) {
            board.install(release)
            board.switchOn()
          }
        })
      for (const { id, key, state, policy } of await rows(store, 'campaign')) {
        if (state === 'paused') order('resume', async (ctx) => await direct(ctx, 'resume', id))
        if (state === 'waiting') order('approve', async (ctx) => await direct(ctx, 'approve', id))
        if (state === 'activating' && policy.overlap === 'strict') order('confirm', async (ctx) => await confirmCut(ctx, alice, id, boards.length))
        // Nobody waits until tomorrow for a window that has closed.
        const isLate = state === 'installing' && policy.window !== null && !windowAt(policy.window, time.now()).open
        if (isLate)
          order('abort, and rotate outside of windows', async (ctx) => {
            await direct(ctx, 'abort', id)
            await startRotation(ctx, alice, key, { because: 'its window has closed' })
          })
        if (state === 'installing' && policy.advance === 'manual') order('advance', async (ctx) => await direct(ctx, 'advance', id))
      }
    }
    for (const board of measured) if (dice.once(4) && !(await isAcceptable(store, board))) leftBehind.add(board)
    await resume()
    // Whoever joined when the rotation that came with it was taken back gets nothing before the next one: joiners read no earlier epoch. And whoever was to read no
    // later one reads on until then.
    for (const { id } of keys)
      if ((await rows(store, 'campaign')).some(({ key, state }) => key === id && (state === 'aborted' || state === 'rolled-back')))
        order(`rotate ${id} once more`, async (ctx) => await startRotation(ctx, alice, id, { because: 'one was aborted' }))
    const operators = setInterval(() => void resume(), 10 * minute)
    // Whoever lost power by its own fault run is switched on again by its watchdog.
    const watchdog = setInterval(() => {
      for (const board of boards) if (board.agent === undefined) board.switchOn()
    }, minute)
    /** Until nothing is owed, and has not been for ten seconds: a report may begin something of its own meanwhile. */
    const rest = async (): Promise<void> => {
      do {
        let last = 0
        const atRest = await time.run(3 * hour, async () => {
          if (time.now() - last < 1_000) return false
          last = time.now()
          return (await unrest()) === undefined
        })
        if (!atRest) throw new Error(`not at rest within 3 hours: ${(await unrest()) ?? 'nothing'}`)
        await time.run(10_000)
      } while ((await unrest()) !== undefined)
    }
    await rest()
    recovery = time.now() - calm
    const membersNow = async () => await Promise.all(boards.map(async (board) => ({ board, device: await store.get('device', board.device) })))
    const opened = await openedByThieves({
      fleet,
      store,
      time,
      dice,
      boards: (await membersNow()).flatMap(({ board, device }) => {
        if (device === undefined || !board.hasTpm || device.state === 'revoked') return []
        return [{ board, copies: [copies.get(board.device), made.get(board.device)].filter((copy) => copy !== undefined) }]
      }),
    })
    met.thefts += opened.length
    // Time went on for the thieves, and for everybody else.
    await rest()
    clearInterval(watchdog)
    clearInterval(operators)
    if (surprises.length > 0) throw new Error(`unexpected: ${surprises[0]}`)
    const devices = (await membersNow()).flatMap(({ board, device }) =>
      device?.state === 'enrolled' && board.agent !== undefined ? [evidenceOf(board.device, board.agent)] : [],
    )
    const log = await exported(store, fleet)
    for (const { policy, because } of await rows(store, 'campaign')) {
      if (policy.window !== null) met.windows++
      if (because.includes('messages under epoch')) met['usage limits']++
    }
    await nothingOutsideItsWindow(store)
    for (const invariant of invariants) await invariant({ store, devices, history, opened, log, auditKey: fleet.auditKey })
  } catch (thrown) {
    failure = thrown instanceof Error ? (thrown.stack ?? thrown.message) : String(thrown)
  } finally {
    for (const board of boards) board.cut()
    crashNow?.()
    time.end()
  }
  return { seed, trace, failure, kills, recovery, treated: network.done, met }
}
