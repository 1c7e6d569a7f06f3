import { hasIdentity } from '@fleetkey/server/fleet/device.ts'
import type { Release } from '@fleetkey/firmware-sim/release/release.ts'
import type { Store } from '@fleetkey/server/flows/context.ts'
import { rows, type Opened } from '../invariants/evidence.ts'
import { openBoard, type Blank, type SimulatedBoard } from './board.ts'
import { diceOf, type Dice } from './dice.ts'
import { openNetwork } from './network.ts'
import type { VirtualTime } from './time.ts'
import { firmware, type Fleet } from './world.ts'

export const idOf = ({ manifest: { model, name } }: Release): string => `${model}/${name}`

/** What operators may put on a board: the newest release that is not withdrawn, unless one with a higher number was proven somewhere; undefined: a new one has to be made. */
export const installable = async (store: Store): Promise<Release | undefined> => {
  const known = (await rows(store, 'release')).toSorted((one, other) => other.number - one.number)
  const floors = (await rows(store, 'device')).map((device) => (hasIdentity(device) ? device.floor : 0))
  const best = known.find(({ withdrawn }) => withdrawn === null)
  return best === undefined || best.number < Math.max(...floors) ? undefined : firmware(best.number)
}

/** Whether keys should work on this board: its release is known, was not withdrawn, and is not older than what the board has proven. */
export const isAcceptable = async (store: Store, { device, release }: SimulatedBoard): Promise<boolean> => {
  if (release === null) return true
  const [row, found] = [await store.get('device', device), await store.get('release', idOf(release))]
  return found?.withdrawn === null && (!hasIdentity(row) || found.number >= row.floor)
}

/** A board that is switched on where no server answers: what it holds as soon as it says that it has keys, or that it has none. */
const alone = async (
  of: { readonly blank: Blank; readonly contents: ReadonlyMap<string, Uint8Array> },
  around: { readonly fleet: Fleet; readonly time: VirtualTime },
): Promise<Opened['holdings']> => {
  const { fleet, time } = around
  const dice = diceOf(1)
  const network = openNetwork({ time, dice })
  const board = openBoard({ ...of, trust: fleet.trust, network, time, dice, log: () => undefined, inUse: () => undefined })
  try {
    board.switchOn()
    await time.run(3_000, () => (board.agent?.status().holdings.length ?? 0) > 0)
    return board.agent?.status().holdings ?? []
  } finally {
    board.cut()
  }
}

/**
 * What can be had from the boards of a thief: each with a withdrawn release, on its medium as it is and on older copies of it; and each medium beside the TPM of
 * another board.
 */
export const openedByThieves = async (of: {
  readonly fleet: Fleet
  readonly store: Store
  readonly time: VirtualTime
  readonly dice: Dice
  readonly boards: readonly { readonly board: SimulatedBoard; readonly copies: readonly ReadonlyMap<string, Uint8Array>[] }[]
}): Promise<readonly Opened[]> => {
  const { store, dice } = of
  const withdrawn = (await rows(store, 'release')).filter((release) => release.withdrawn !== null)
  const found: Opened[] = []
  for (const [at, { board, copies }] of of.boards.entries()) {
    const { device } = board
    const blank = board.blank()
    if (!('tpm' in blank.hardware)) continue
    const contents = board.medium.contents()
    if (withdrawn.length > 0) {
      const { id, number } = dice.pick(withdrawn)
      const hardware = { ...blank.hardware, release: firmware(number) }
      for (const [copy, medium] of [contents, ...copies].entries()) {
        const how = `${id} on ${copy === 0 ? 'its medium' : `copy ${copy} of its medium`}`
        found.push({ device, by: 'withdrawn', how, holdings: await alone({ blank: { ...blank, hardware }, contents: medium }, of) })
      }
    }
    const other = of.boards[(at + 1) % of.boards.length]?.board
    if (other === undefined || other === board || !other.hasTpm) continue
    const holdings = await alone({ blank: { ...other.blank(), serial: blank.serial }, contents }, of)
    found.push({ device, by: 'another TPM', how: `beside the TPM of ${other.device}`, holdings })
  }
  return found
}
